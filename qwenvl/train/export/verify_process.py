"""Open a saved folder in a fresh process with stock transformers, and compare it with the model in training.

    python -m qwenvl.train.export.verify_process FOLDER CASES.safetensors WEIGHTS.json [--device cpu] [--dtype auto]
                                           [--reduced bfloat16]

The model is stock: ``AutoModelForImageTextToText``, ``AutoProcessor`` and, for an adapter, PEFT, on its base with the
context of training. Only the classes of families that transformers does not have, the head of a task, and the
dequantization of an FP8 base are this trainer's.
CASES holds, for each sample N from 0, ``N.input_ids`` int64 [1, T], ``N.rows`` int64 [n], ``N.logits`` float32 [n, V],
the model's inputs for its media, and ``N.scores`` if a task has a head. The model computes positions that CASES does
not hold. WEIGHTS holds ``tensors``, checksums from :mod:`qwenvl.models.fingerprints`, and ``scales`` of adapters.

Tensors must be equal, byte for byte. The logits of training may differ from float32 logits by as much as rounding to
training's data type explains: with ``--reduced``, the same model also runs in that type, which measures this
difference (:mod:`qwenvl.train.export.distance`). The last line printed is JSON: ``problems``, a list of sentences, and
``differences``, records of ``where``, ``error``, ``noise`` and ``multiple``, those of scores first.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.families import register_classes_of
from qwenvl.models.fingerprints import adapter_scales, differing, listed, opened_tensors
from qwenvl.models.float32_compute import computing_in_float32
from qwenvl.models.mtp.files import read_tensors
from qwenvl.models.mtp.layer import is_mtp
from qwenvl.models.quantization import dequantizing, finish_dequantizing
from qwenvl.models.rope_scaling import read_extension
from qwenvl.models.task_module import NAME
from qwenvl.tasks import files as task_files
from qwenvl.train.export.distance import MEDIAN, Rows, content_of, measures, row_differences

OUT_OF_MEMORY = 3
"""Exit code if there is not enough memory, which says nothing about the folder."""

_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Open, compare and print; return the exit code: 0 if the comparison was made, whatever its result."""
    parser = argparse.ArgumentParser(description="Compare a saved folder with what training knows of it.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of the base model of an adapter")
    parser.add_argument("--reduced", choices=["bfloat16", "float16"], help="what training computed in, if not float32")
    arguments = parser.parse_args(argv)
    differences: list[dict[str, Any]] = []
    try:
        model, problems = open_model(arguments.folder, arguments.dtype)
        problems += check_weights(arguments.folder, model, json.loads(arguments.weights.read_text(encoding="utf-8")))
        problems += check_processor(arguments.folder)
        cases = split_cases(load_file(arguments.cases))
        if not problems:
            model = model.to(arguments.device).eval()
            differences = compare(arguments.folder, model, cases, arguments.reduced)
    except (MemoryError, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    except _FAILURES as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        problems, differences = [f"stock transformers cannot use it: {type(error).__name__}: {first_line}"], []
    sys.stdout.write(json.dumps({"problems": problems, "differences": differences}) + "\n")
    return 0


def open_model(folder: Path, dtype: str) -> tuple[Any, list[str]]:
    """Return the model and the problems of its weights."""
    path = folder / "adapter_config.json"
    adapted = path.is_file()
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapted else str(folder)
    register_classes_of(base)
    if adapted:
        from peft import PeftModel

        config = AutoConfig.from_pretrained(base)
        for name, value in read_extension(folder, base).items():
            setattr(config.get_text_config(), name, value)
        whole = dequantizing(config, config.to_dict())
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, config=whole)
        if whole is not config:
            finish_dequantizing(model, getattr(torch, dtype))
        return PeftModel.from_pretrained(model, folder), []
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    names = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    problems = [f"{kind.replace('_', ' ')}: {', '.join(found[:6])}" for kind, found in names.items() if found]
    return model, problems


def check_weights(folder: Path, model: Any, known: Mapping[str, Any]) -> list[str]:
    """Return the problems of the weights: every tensor must be bit-identical to that of training."""
    task = load_file(folder / task_files.WEIGHTS_FILE) if task_files.is_task_folder(folder) else {}
    found = opened_tensors(model) | {f"{NAME}.{name}": tensor for name, tensor in task.items()}
    if any(map(is_mtp, known["tensors"])):  # transformers does not open the trained layer
        found |= read_tensors(sorted(folder.glob("model*.safetensors")))
    wrong = differing(known["tensors"], found)
    problems = [f"{len(wrong)} tensors are not those of training: {listed(wrong)}"] if wrong else []
    scales = adapter_scales(model)
    wrong = [name for name, scale in known["scales"].items() if scales.get(name) != scale]
    return problems + ([f"{len(wrong)} adapters have another scale than in training: {listed(wrong)}"] if wrong else [])


def check_processor(folder: Path) -> list[str]:
    """Return the problems of the processor."""
    processor = AutoProcessor.from_pretrained(folder)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    return [] if processor.image_token in text else ["the chat template does not render images"]


def split_cases(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of each sample, under their names without the sample's number."""
    cases: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        cases.setdefault(int(number), {})[key] = tensor
    return [cases[number] for number in sorted(cases)]


class Found(NamedTuple):
    """Outputs of a model for a sample.

    Args:
        logits: float32 [n, V], logits of the compared rows.
        scores: float32 [units, outputs], output of a task's head; None without one.
    """

    logits: Tensor
    scores: Tensor | None


def compare(
    folder: Path, model: Any, cases: Sequence[Mapping[str, Tensor]], reduced: str | None
) -> list[dict[str, Any]]:
    """Return the distance of training's outputs from the folder's in float32, and that of rounding alone.

    Args:
        folder: Folder that the model was opened from.
        model: Opened model, on its device; converted to the reduced type.
        cases: Result of :func:`split_cases`.
        reduced: Data type that training computed in; None for float32.

    Returns:
        Records as of :func:`~qwenvl.train.export.distance.measures`, those of scores first; without a reduced type the
        noise is 0.
    """
    with computing_in_float32(model):
        exact = [compute(folder, model, case) for case in cases]
    rounded = exact
    if reduced is not None:
        model = model.to(getattr(torch, reduced))
        rounded = [compute(folder, model, case) for case in cases]
    rows = [
        Rows(
            content_of(case["input_ids"][0], model.config)[case["rows"]],
            row_differences(case["logits"], one.logits),
            row_differences(other.logits, one.logits),
        )
        for case, one, other in zip(cases, exact, rounded, strict=True)
    ]
    floor = max((float(sample.noise.median()) for sample in rows), default=0.0)
    scores = [
        {"where": "of a head", "error": _share(case["scores"], one.scores), "multiple": MEDIAN}
        | {"noise": max(_share(other.scores, one.scores), floor)}
        for case, one, other in zip(cases, exact, rounded, strict=True)
        if one.scores is not None and other.scores is not None
    ]
    return scores + (list(measures(rows)) if rows else [])


def _share(found: Tensor, exact: Tensor) -> float:
    """Return mean absolute difference of scores / mean absolute score."""
    apart = float((found - exact).abs().mean() / exact.abs().mean().clamp(min=1e-9))
    return apart if math.isfinite(apart) else float("inf")


def compute(folder: Path, model: Any, case: Mapping[str, Tensor]) -> Found:
    """Return a model's outputs for a sample, by its stock ``forward``."""
    ids, config = case["input_ids"], model.config
    inputs = {name: tensor for name, tensor in case.items() if name not in ("rows", "logits", "scores")}
    inputs["attention_mask"] = torch.ones_like(ids)
    scores = _scores(folder, model, inputs) if "scores" in case else None
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    stock = getattr(model, "get_base_model", lambda: model)()
    known = inspect.signature(stock.forward).parameters
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name in known}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False, logits_to_keep=case["rows"].to(model.device)).logits[0]
    return Found(logits.float().cpu(), scores)


def _scores(folder: Path, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    from qwenvl.tasks.registry import saved_predictor

    predictor = saved_predictor(str(folder))
    assert predictor is not None, "training gave scores"
    return predictor.scores(str(folder), model, inputs)


if __name__ == "__main__":
    sys.exit(main())
