"""Accepted drafts of a multi-token prediction layer: before fine-tuning, and after it with --train_mtp or without.

    python benchmarks/mtp_acceptance.py [--steps 150] [--family qwen3_5] [--output DIR]

A tiny random model first learns with its layer to recite words in one order, so that the layer fits the model as in a
published checkpoint. It is then fine-tuned to recite them in another order: without --train_mtp, with it, and without
it but with the layer trained alone afterwards. For questions that training has not seen, the model answers greedily;
a draft is accepted if the token that the layer predicts from position t is the model's own token t + 2, as in greedy
speculative decoding with one draft token. Prints one line of JSON: the share of accepted drafts, by stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from transformers import AutoProcessor

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.models.forward import install
from qwenvl.models.loading import add_mtp, load_model
from qwenvl.models.loss.causal_lm import run_model
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks.multi_token import MultiTokenObjective
from qwenvl.train.train_qwen import main as train

WORDS = "the a red blue square circle moves left right up down slowly cat dog one two three".split()
ANSWER = 12
"""Words of an answer."""
SHOWN = (1, 2, 3, 4)
"""Words of a question."""
HELD_OUT = 5
"""Every fifth question is asked only, never trained."""


def recitals(step: int, *, held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield questions, some words in their order, and answers, the words after them: every ``step``-th of the list."""
    for number, (start, shown) in enumerate(itertools.product(range(len(WORDS)), SHOWN)):
        words = [WORDS[(start + step * place) % len(WORDS)] for place in range(shown + ANSWER)]
        if (number % HELD_OUT == 0) == held_out:
            yield " ".join(words[:shown]), " ".join(words[shown:])


def write_data(folder: Path, name: str, step: int) -> None:
    """Write annotations of the questions that are trained."""
    rows = [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in recitals(step, held_out=False)
    ]
    (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def run(folder: Path, model: str, name: str, dataset: str, arguments: argparse.Namespace, **switches: Any) -> str:
    """Train one stage; return its folder."""
    settings = {
        "model_name_or_path": folder / model,
        "output_dir": folder / name,
        "dataset_registry": folder / "registry.py",
        "dataset_use": dataset,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "max_steps": arguments.steps,
        "save_strategy": "no",
        "logging_steps": arguments.steps,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "verify_export": False,
        **switches,
    }
    if train([text for flag, value in settings.items() for text in (f"--{flag}", str(value))]):
        raise SystemExit("training failed")
    return name


def text_batch(ids: Tensor, prompt: int) -> dict[str, Any]:
    """Return a batch of the collator with one sample of text alone, whose answer is trained."""
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(ids.shape[1]).expand(4, 1, -1),
        "attention_mask": torch.ones_like(ids),
        "vision_rows": torch.zeros(0, dtype=torch.int64),
        "num_samples": 1,
    }


def drafts(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the token that the layer predicts after the next one, from each position: int64 [T]."""
    states: list[Tensor] = []
    handle = model.mtp.register_forward_hook(lambda _, __, output: states.append(output[0]))
    run_model(model, MultiTokenObjective(1.0).prepare(batch))
    handle.remove()
    return nn.functional.linear(states[0], model.lm_head.weight).argmax(-1)


@torch.no_grad()
def measure(folder: Path, step: int) -> float:
    """Return the share of accepted drafts in a folder's answers to the held-out questions."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = load_model(str(folder), dtype=torch.float32, attn_implementation="sdpa").eval()
    add_mtp(model, str(folder), torch.float32)
    install(model, Patchify.from_processor(processor))
    accepted = drafted = 0
    for question, answer in recitals(step, held_out=True):
        turns = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        length = len(processor.tokenizer(answer)["input_ids"])
        ids = model.generate(prompt, max_new_tokens=length, do_sample=False)
        asked = prompt.shape[1]
        found = drafts(model, text_batch(ids, asked))[asked - 1 : -2]
        accepted, drafted = accepted + int((found == ids[0, asked + 1 :]).sum()), drafted + len(found)
    return round(accepted / drafted, 3)


def experiment(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run all stages in a folder."""
    build_tiny_checkpoint(arguments.family, folder / "random")
    steps = {"first": 1, "second": 5}
    for name, step in steps.items():
        write_data(folder, name, step)
    paths = {name: {"annotation_path": str(folder / f"{name}.json"), "data_path": ""} for name in steps}
    (folder / "registry.py").write_text(f"data_dict = {paths!r}\n", encoding="utf-8")
    whole = {"tune_mm_llm": True, "tune_mm_mlp": False, "tune_mm_vision": False}
    run(folder, "random", "published", "first", arguments, **whole, train_mtp=True, mtp_loss_weight=1.0)
    run(folder, "published", "without", "second", arguments, **whole)
    run(folder, "published", "with", "second", arguments, **whole, train_mtp=True)
    alone = {"tune_mm_llm": False, "tune_mm_mlp": False, "tune_mm_vision": False}
    run(folder, "without", "alone", "second", arguments, **alone, train_mtp=True)
    measured = {"random": 1, "published": 1, "without": 5, "with": 5, "alone": 5}
    return {name: measure(folder / name, step) for name, step in measured.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="steps of each stage")
    parser.add_argument("--family", default="qwen3_5", choices=["qwen3_5", "qwen3_5_moe"])
    parser.add_argument("--output", type=Path, help="folder to keep the models in; a temporary one otherwise")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"steps": arguments.steps, **experiment(folder, arguments)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
