"""The seam of tasks: one line of the registry is all that the trainer and the commands need to know a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.cli.check_image.command import main as check
from qwenvl.config.tasks import LOSSES, METRICS, TaskName
from qwenvl.tasks.files import RECORD_FILE
from qwenvl.tasks.objective import Task
from qwenvl.tasks.registry import TASKS, saved_predictor
from qwenvl.utils.errors import UserError
from tests.e2e.runs import (
    equal_bits,
    history,
    logged_losses,
    losses_alone,
    open_trainer,
    read_annotations,
    train,
    weights,
)
from tests.tasks.pairs import BETA, PAIRS, PairLoss

PAIR_RUN: dict[str, Any] = {"task": "classification", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def test_settings_and_registry_know_the_same_tasks() -> None:
    assert set(get_args(TaskName)) == TASKS.keys() == LOSSES.keys() == METRICS.keys()


def test_a_module_of_another_trainer_is_refused(tmp_path: Path) -> None:
    assert saved_predictor(str(tmp_path)) is None
    (tmp_path / RECORD_FILE).write_text(json.dumps({"task": "segmentation"}))
    with pytest.raises(UserError, match="names the task 'segmentation', which is not one of classification"):
        saved_predictor(str(tmp_path))


@pytest.fixture
def pairs(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of samples with a worse answer; ``--task classification`` means the task of tests/tasks/pairs.py."""
    monkeypatch.setitem(TASKS, "classification", PAIRS)
    entries = {}
    for name in ("text", "mixed", "held_out"):
        records = read_annotations(registry, name)
        worse = [{**record, "rejected": f"Nothing, {number} times."} for number, record in enumerate(records)]
        (tmp_path / f"{name}.json").write_text(json.dumps(worse))
        entries[name] = {"annotation_path": str(tmp_path / f"{name}.json"), "data_path": str(registry.parent)}
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return tmp_path / "registry.py"


def answers_likely(folder: Path, records: list[dict[str, Any]], key: str) -> torch.Tensor:
    """Return the log-probability of each answer by the stock model of a folder: float32 [records]."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    found = []
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        turns = [{"role": "user", "content": question}]
        prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        text = prompt + (record["rejected"] if key == "rejected" else answer) + "<|im_end|>\n"
        before, ids = (torch.tensor([processor.tokenizer(one)["input_ids"]]) for one in (prompt, text))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, before.shape[1] - 1 : -1].float()
        found.append(-functional.cross_entropy(logits, ids[0, before.shape[1] :], reduction="sum"))
    return torch.stack(found)


def test_a_pair_loss_with_a_reference_needs_no_other_change(
    pairs: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first loss is log 2: model and reference agree. The second is that of the saved weights, by stock models."""
    base = tiny_checkpoint("qwen3_vl")
    records = json.loads((pairs.parent / "text.json").read_text())
    whole = {"dataset_use": "text", "per_device_train_batch_size": len(records)}
    folder = train(base, tmp_path / "run", pairs, **PAIR_RUN, **whole)
    margins = [
        answers_likely(weights_of, records, "chosen") - answers_likely(weights_of, records, "rejected")
        for weights_of in (folder / "checkpoint-1", base)
    ]
    expected = -functional.logsigmoid(BETA * (margins[0] - margins[1])).mean().item()
    assert history(folder) == [pytest.approx(0.693147, rel=1e-4), pytest.approx(expected, rel=1e-3)]
    assert expected < 0.69
    assert weights(folder).keys() == weights(base).keys()


@pytest.mark.parametrize("changes", [{"data_flatten": True}, {"gradient_accumulation_steps": 4}], ids=str)
def test_it_does_not_depend_on_how_pairs_are_split(
    changes: dict[str, Any], pairs: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With pictures and videos; the evaluation's worst pair and its number of pairs are those of all ranks' records."""
    settings: dict[str, Any] = {**PAIR_RUN, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset_use": "held_out"}
    size = 8 // changes.get("gradient_accumulation_steps", 1)
    model = tiny_checkpoint("qwen3_vl")
    one = train(model, tmp_path / "one", pairs, **settings, per_device_train_batch_size=8)
    other = train(model, tmp_path / "other", pairs, **settings, **changes, per_device_train_batch_size=size)
    for key in ("loss", "eval_loss", "eval_worst_pair"):
        assert history(other, key) == pytest.approx(history(one, key), rel=2e-4), key
    assert set(history(other, "eval_pairs")) == {4}


class MovedReference(PairLoss):
    """Compares with weights that the model does not start from, so that the first losses differ."""

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        with torch.no_grad():
            for parameter in self.reference.parameters():
                parameter.mul_(0.9)


def open_moved(*arguments: Any) -> Task:
    return Task(MovedReference(), PAIRS.open(*arguments).targets)


@pytest.mark.parametrize(
    "layout",
    [
        {"per_device_train_batch_size": 11},
        {"per_device_train_batch_size": 4, "data_flatten": True, "gradient_accumulation_steps": 3},
        {"data_packing": True, "model_max_length": 256, "gradient_accumulation_steps": 11},
    ],
    ids=["padded", "flattened", "packed"],
)
def test_the_losses_of_samples_are_those_of_their_pairs_alone(
    layout: dict[str, Any],
    pairs: Path,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TASKS, "classification", replace(PAIRS, open=open_moved))
    model, settings = tiny_checkpoint("qwen3_vl"), {**PAIR_RUN, "max_steps": 1, "save_strategy": "no"}
    alone = losses_alone(open_trainer(model, tmp_path / "alone", pairs, **settings, per_device_train_batch_size=1))
    assert len(alone) == 11 and {units for _, units in alone.values()} == {1}
    assert len({round(loss, 3) for loss, _ in alone.values()}) > 5
    found = logged_losses(train(model, tmp_path / "run", pairs, **settings, **layout, log_sample_losses=True))
    assert found.keys() == alone.keys()
    for line, expected in alone.items():
        assert found[line] == pytest.approx(expected, rel=1e-4), line


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_a_resumed_run_keeps_the_reference_of_its_start(
    family: str, pairs: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Packed, so that linear attention runs over one sample at a time."""
    model = tiny_checkpoint(family)
    run = {**PAIR_RUN, "dataset_use": "text", "data_flatten": True}
    whole = train(model, tmp_path / "whole", pairs, **run)
    train(model, tmp_path / "parts", pairs, **{**run, "max_steps": 1})
    parts = train(model, tmp_path / "parts", pairs, **run)
    assert history(parts) == history(whole) and equal_bits(parts, whole)


def test_its_rows_are_checked_by_its_reader(
    pairs: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = json.loads((pairs.parent / "text.json").read_text())
    del records[1]["rejected"]
    (pairs.parent / "text.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    asked = ["--dataset_registry", str(pairs), "--dataset_use", "text", "--task", "classification"]
    assert check([*asked, "--model_name_or_path", str(tiny_checkpoint("qwen3_vl"))]) == 1
    (problem,) = [json.loads(line) for line in (tmp_path / "text_problems.jsonl").read_text().splitlines()]
    assert "the sample has no text 'rejected'" in json.dumps(problem)
