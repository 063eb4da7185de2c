"""Opens a saved folder in a process of its own, as anybody would, and compares its logits with those it is given.

    python -m qwenvl.evaluate.export_check FOLDER CASES.safetensors [--device cpu] [--dtype auto]

Nothing of this trainer is used here, but the classes of the connector lab, which transformers does not have:
``AutoModelForImageTextToText``, ``AutoProcessor`` and, for an adapter, PEFT. Only where a case has ``N.scores``, what
the head of a task has to say of it, is the head opened by this trainer's own code.
CASES holds, for each sample numbered from 0, ``N.input_ids`` int64 [1, T], ``N.rows`` int64 [n], ``N.logits`` float32
[n, V] and, where the sample has media, what the model's ``forward`` takes of them. Positions are left to the model.
The last line printed is JSON: ``problems``, a list of sentences, and ``differences``, one record a sample.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.lab.registration import register

_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Open, compare and print; return the exit code: 0 if the comparison was made, whatever came of it."""
    parser = argparse.ArgumentParser(description="Compare the logits of a saved folder with given ones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of the base model of an adapter")
    arguments = parser.parse_args(argv)
    register()
    try:
        model, problems = open_model(arguments.folder, arguments.dtype)
        problems += check_processor(arguments.folder)
        cases = split_cases(load_file(arguments.cases))
        model = model.to(arguments.device).eval()
        differences = [compare_scores(arguments.folder, model, case) for case in cases if "scores" in case]
        differences += [compare(model, case) for case in cases]
    except _FAILURES as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        problems, differences = [f"stock transformers cannot use it: {type(error).__name__}: {first_line}"], []
    sys.stdout.write(json.dumps({"problems": problems, "differences": differences}) + "\n")
    return 0


def open_model(folder: Path, dtype: str) -> tuple[Any, list[str]]:
    """Return the model, and what is wrong with its weights."""
    path = folder / "adapter_config.json"
    if path.is_file():
        from peft import PeftModel

        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=dtype), folder), []
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    names = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    problems = [f"{kind.replace('_', ' ')}: {', '.join(found[:6])}" for kind, found in names.items() if found]
    return model, problems


def check_processor(folder: Path) -> list[str]:
    """Return what is wrong with the processor."""
    processor = AutoProcessor.from_pretrained(folder)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    return [] if processor.image_token in text else ["the chat template does not render pictures"]


def split_cases(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors of each sample, by their names without its number."""
    cases: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        cases.setdefault(int(number), {})[key] = tensor
    return [cases[number] for number in sorted(cases)]


def compare_scores(folder: Path, model: Any, case: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return how far the scores of the folder's head are from the given ones, as shares of their size; takes them out.

    Returns:
        ``mean`` and ``largest`` difference.
    """
    from qwenvl.evaluate.generate import Answerer
    from qwenvl.evaluate.task_model import TaskModel, open_head

    expected = case.pop("scores")
    inputs = {name: value for name, value in case.items() if name not in ("rows", "logits")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    head = open_head(str(folder)).to(model.device)
    found = torch.from_numpy(TaskModel(Answerer(model, None), head).scores(inputs)[0])
    apart = (found - expected).abs() / expected.abs().mean().clamp(min=1e-9)
    return {"mean": float(apart.mean()), "largest": float(apart.max())}


def compare(model: Any, case: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return how far the model's logits are from the given ones.

    Returns:
        ``mean`` and ``largest`` difference, in standard deviations of the given logits.
    """
    rows, expected = case.pop("rows"), case.pop("logits")
    ids, config = case["input_ids"], model.config
    inputs = {**case, "attention_mask": torch.ones_like(ids)}
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    stock = getattr(model, "get_base_model", lambda: model)()
    known = inspect.signature(stock.forward).parameters
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items() if name in known}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, rows.to(model.device)].float().cpu()
    apart = (logits - expected).abs() / expected.std().clamp(min=1e-9)
    apart = apart.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return {"mean": float(apart.mean()), "largest": float(apart.max())}


if __name__ == "__main__":
    sys.exit(main())
