"""Weights of turns in whole runs: against a loss by hand, however samples are laid out; said by every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.show_sample import main as show_sample
from qwenvl.train.train_qwen import main
from tests.e2e.runs import equal_bits, flags, history, largest_difference, run_on_two_ranks, train, weights

DESCENT = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0, "dataset_use": "weighted", "max_steps": 2}
WEIGHTS = ((0.5,), (None, 2.0), (0.1, 1, 0), (3,))
"""Of the answers of each sample."""


def record(number: int, given: tuple[Any, ...], factor: float = 1.0) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for place, weight in enumerate(given):
        answer = {"from": "gpt", "value": f"{'red blue ' * (1 + number + 2 * place)}."}
        if weight is not None:
            answer["weight"] = weight * factor
        turns += [{"from": "human", "value": f"Sample {number}, question {place}?"}, answer]
    return {"id": str(number), "conversations": turns}


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry: ``weighted``; without any; and those in which all answers have one weight."""
    folder = tmp_path_factory.mktemp("weighted")
    sets = {
        "weighted": [record(number, given) for number, given in enumerate(WEIGHTS)],
        "none": [record(number, (None,) * len(given)) for number, given in enumerate(WEIGHTS)],
        "ones": [record(number, (1.0,) * len(given)) for number, given in enumerate(WEIGHTS)],
        "twos": [record(number, (1.0,) * len(given), 2.0) for number, given in enumerate(WEIGHTS)],
        "hundredths": [record(number, (1.0,) * len(given), 0.01) for number, given in enumerate(WEIGHTS)],
    }
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    entries = {name: {"annotation_path": str(folder / f"{name}.json"), "data_path": ""} for name in sets}
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return folder / "registry.py"


def rows_of(model: Path, registry: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the training rows of ``weighted`` as show_sample writes them."""
    data = ["--dataset_use", "weighted", "--dataset_registry", str(registry), "--model_name_or_path", str(model)]
    assert show_sample([*data, "--all", "--json", str(folder / "rows.jsonl")]) == 0
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def loss_by_hand(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """The mean of the stock model's token losses by the weights of the records: trained stretches are the answers."""
    losses, factors = list[Tensor](), list[float]()
    for row, given in zip(rows, WEIGHTS, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        each = functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], reduction="none")
        trained = [place for place, label in enumerate(row["labels"]) if label != -100]
        first = [trained[0], *(right for left, right in pairwise(trained) if right > left + 1)]
        answers = [1.0 if weight is None else weight for weight in given if weight != 0]
        assert len(first) == len(answers)
        for place in trained:
            losses.append(each[place - 1])
            factors.append([weight for start, weight in zip(first, answers, strict=True) if start <= place][-1])
    return torch.stack(losses) @ torch.tensor(factors, dtype=losses[0].dtype) / sum(factors)


def test_a_step_is_that_of_a_weighted_mean(
    weighted: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Loss and weights after one step of gradient descent, from stock transformers in float64."""
    start = tiny_checkpoint("qwen3_vl")
    one = {**DESCENT, "max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0}
    found = train(start, tmp_path / "out", weighted, **one, eval_dataset_use="weighted", eval_strategy="epoch")
    rows = rows_of(start, weighted, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float64)
    loss = loss_by_hand(model, rows)
    loss.backward()
    assert history(found) == pytest.approx([loss.item()], rel=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= DESCENT["learning_rate"] * parameter.grad
    after, before = weights(found), weights(start)
    expected = {name: value for name, value in model.state_dict().items() if name in after}
    assert len(expected) >= len(after) - 1
    moved = max(float((expected[name] - before[name]).abs().max()) for name in expected)
    assert max(float((after[name] - value).abs().max()) for name, value in expected.items()) < 1e-5 * moved + 1e-8
    assert history(found, "eval_loss") == pytest.approx([loss_by_hand(model, rows).item()], rel=1e-5)
    assert history(found, "eval_trained_tokens") == [sum(label != -100 for row in rows for label in row["labels"])]


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 4},
    "flattened": {"per_device_train_batch_size": 4, "data_flatten": True},
    "packed": {"per_device_train_batch_size": 1, "data_packing": True},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


def test_the_layout_makes_no_difference(weighted: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """All samples are one step; they weigh more and less than 1 in all."""
    runs = {
        name: train(tiny_checkpoint("qwen3_vl"), tmp_path / name, weighted, **DESCENT, **layout)
        for name, layout in LAYOUTS.items()
    }
    for name, run in runs.items():
        assert history(run) == pytest.approx(history(runs["padded"]), rel=1e-5), name
        assert largest_difference(run, runs["padded"]) < 1e-6, name
    plain = train(tiny_checkpoint("qwen3_vl"), tmp_path / "none", weighted, **{**DESCENT, "dataset_use": "none"})
    assert largest_difference(plain, runs["padded"]) > 1e-3


def test_equal_weights_are_as_none(weighted: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Also where the weights of a step add up to less than 1."""
    none, ones, twos, hundredths = (
        train(tiny_checkpoint("qwen3_vl"), tmp_path / name, weighted, **{**DESCENT, "dataset_use": name})
        for name in ("none", "ones", "twos", "hundredths")
    )
    assert equal_bits(none, ones) and history(none) == history(ones)
    for run in (twos, hundredths):
        assert history(run) == pytest.approx(history(none), rel=1e-6)
        assert largest_difference(run, none) < 1e-6


@pytest.mark.slow
def test_two_ranks_train_like_one(weighted: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model, alone = tiny_checkpoint("qwen3_vl"), tmp_path / "alone"
    train(model, alone, weighted, **DESCENT, per_device_train_batch_size=4)
    split = {**DESCENT, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found = run_on_two_ranks(tmp_path, {"ddp": flags(model, tmp_path / "ddp", weighted, **split)}, "DDP")
    assert history(found["ddp"]) == pytest.approx(history(alone), rel=1e-5)
    assert largest_difference(found["ddp"], alone) < 1e-6


def test_every_command_says_the_same(
    weighted: Path,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    model = tiny_checkpoint("qwen3_vl")
    run = flags(model, tmp_path / "out", weighted, **DESCENT)
    for more in (["--dry_run", "True", "--data_packing", "True"], ["--data_packing", "True"]):
        assert main([*run, *more]) == 0
        assert "4 of 6 answers" in capsys.readouterr().err
    data = ["--dataset_use", "weighted", "--dataset_registry", str(weighted), "--model_name_or_path", str(model)]
    assert check_image([*data, "--output", str(tmp_path / "check"), "--workers", "0"]) == 0
    capsys.readouterr()
    assert show_sample([*data, "--index", "2"]) == 0
    shown = capsys.readouterr().out
    assert "message 1: weight 0.1" in shown and "message 3" not in shown
    rows = rows_of(model, weighted, tmp_path)
    assert {round(weight, 6) for row in rows for weight in row["loss_weights"]} == {0.0, 0.1, 0.5, 1.0, 2.0, 3.0}


def test_a_wrong_weight_is_one_message(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    lines = [json.dumps(record(0, (1,))), json.dumps(record(1, (-0.5,)))]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "registry.py").write_text("data_dict = {'bad': {'annotation_path': 'rows.jsonl', 'data_path': ''}}\n")
    run = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", tmp_path / "registry.py", dataset_use="bad")
    reason = "turn 2: 'weight' must be 0 (not trained) or a number from 0.001 to 1000, the factor of the turn's loss"
    for more in ([], ["--dry_run", "True"]):
        said = fail([*run, *more])
        assert said.startswith(f"dataset 'bad', {tmp_path}/rows.jsonl:2 (id '1'): {reason}, not -0.5.")
    data = ["--dataset_use", "bad", "--dataset_registry", str(tmp_path / "registry.py")]
    assert check_image([*data, "--output", str(tmp_path / "check"), "--workers", "0"]) == 1
    assert any(reason in line for file in (tmp_path / "check").rglob("*") if file.is_file() for line in file.open())
