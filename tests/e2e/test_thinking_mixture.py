"""A mixture of thinking and plain data trains one model that answers both ways, as it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.cli.evaluate.command import main as evaluate
from tests.e2e.runs import train

QUESTIONS = {"one": "1", "two": "2", "three": "3"}


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    rows = []
    for word, digit in QUESTIONS.items():
        question = {"role": "user", "content": f"Digit of {word}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": digit}]})
        thinker = {"role": "assistant", "content": f"<think>\n{word} it is\n</think>\n\n{digit}"}
        rows.append({"messages": [question, thinker]})
        follow_up = {"role": "user", "content": "And again?"}
        same = {**thinker, "content": f"<think>\nsame\n</think>\n\n{digit}"}
        rows.append({"messages": [question, thinker, follow_up, same]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    registry = tmp_path / "registry.py"
    registry.write_text("data_dict = {'mixture': {'annotation_path': 'rows.jsonl', 'data_path': ''}}\n")
    return registry


def answer(folder: Path, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """Ask the saved folder as a server does, with stock transformers."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **arguments
    )
    with torch.inference_mode():
        written = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text: str = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.slow
def test_a_mixture_answers_both_ways(mixture: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    settings = {"dataset_use": "mixture", "max_steps": 150, "learning_rate": 3e-3, "per_device_train_batch_size": 4}
    folder = train(tiny_checkpoint("qwen3_5"), tmp_path / "out", mixture, **settings)
    for word, digit in QUESTIONS.items():
        question = {"role": "user", "content": f"Digit of {word}?"}
        assert answer(folder, [question], enable_thinking=False) == digit
        assert answer(folder, [question], enable_thinking=True) == f"{word} it is\n</think>\n\n{digit}"
        again = [question, {"role": "assistant", "content": digit}, {"role": "user", "content": "And again?"}]
        assert answer(folder, again, enable_thinking=True) == f"same\n</think>\n\n{digit}"
    record = json.loads((folder / "serving.json").read_text())
    assert (record["enable_thinking"], record["history"]) == ("auto", "exact")
    assert 'ask with `"chat_template_kwargs": {"enable_thinking": true}`' in (folder / "README.md").read_text()
    flags = ["--model_name_or_path", str(folder), "--dataset_use", "mixture", "--dataset_registry", str(mixture)]
    assert evaluate([*flags, "--output", str(tmp_path / "evaluation"), "--max_new_tokens", "24"]) == 0
    (scores,) = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["datasets"]
    assert (scores["count"], scores["score"]["value"]) == (9, 1.0)
