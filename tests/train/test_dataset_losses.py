"""Losses, tokens and metrics by dataset: those of each dataset alone, however its samples are laid out and split."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwenvl.tasks.objective import causal_loss
from qwenvl.train.dataset_losses import FILE_NAME, DatasetLosses, by_dataset
from qwenvl.train.trainer import Trainer
from qwenvl.utils.errors import Origin
from tests.e2e.labelled import SETTINGS as LABELLED
from tests.e2e.runs import REPOSITORY, flags, run_on_two_ranks, train

# Seven samples: an epoch of four steps, in one log line. Weights hardly move, so that a loss says which samples it has.
STEPS: dict[str, Any] = {"max_steps": 4, "logging_steps": 4, "optim": "sgd", "learning_rate": 1e-9}
BOTH = {
    **STEPS,
    "dataset_use": "pictures,text",
    "eval_dataset_use": "held_out,mixed",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_eval_batch_size": 3,
}
ONE_STEP = {"max_steps": 1, "logging_steps": 1, "eval_steps": 1, "gradient_accumulation_steps": 100}
FIGURES = ("loss", "trained_tokens", "tokens")


def figures(folder: Path, prefix: str = "") -> dict[str, float]:
    """Return the figures by dataset of a run's only line of training or evaluation."""
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    (found,) = [line for line in lines if f"{prefix}loss" in line]
    return {key: value for key, value in found.items() if "/" in key}


def alone(trainer: Trainer) -> dict[str, float]:
    """Return the figures of all samples of a trainer's training data, from the loss of their sums."""
    total, trained, tokens = 0.0, 0, 0
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            trained += batch["num_units"]
            tokens += int(batch["attention_mask"].sum()) * (batch["num_samples"] > 0)
            kept = {name: value for name, value in batch.items() if name not in ("events", "error", "origins")}
            total += causal_loss(trainer.model, kept, num_trained_tokens=1.0).item()
    return dict(zip(FIGURES, (total / trained, trained, tokens), strict=True))


@pytest.fixture
def expected(trainer_of: Callable[..., Trainer]) -> Callable[..., dict[str, float]]:
    """Return a function of a prefix and datasets that returns their figures, each from a trainer of its own."""

    def function(prefix: str, *names: str) -> dict[str, float]:
        return {
            f"{prefix}{key}/{name}": value
            for name in names
            for key, value in alone(trainer_of(dataset_use=name)).items()
        }

    return function


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"data_flatten": True},
        {"data_packing": True, "model_max_length": 256, **ONE_STEP},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ],
    ids=["padded", "flattened", "packed", "accumulated"],
)
def test_a_dataset_has_the_loss_that_it_has_alone(
    layout: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    expected: Callable[..., dict[str, float]],
) -> None:
    settings = {**BOTH, **layout}
    run = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    assert figures(run) == pytest.approx(expected("", "pictures", "text"), rel=1e-5)
    assert figures(run, "eval_") == pytest.approx(expected("eval_", "held_out", "mixed"), rel=1e-5)
    page = (run / "report.html").read_text()
    assert all(f"Loss: {name}" in page for name in ("pictures", "text", "held_out", "mixed"))


def test_answers_with_weights_count_by_them(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """A sample of weight 0.5 counts half: the mean is that of all tokens by their weights."""
    record = json.loads((registry.parent / "text.json").read_text())[1]
    heavy, light = ([*record["conversations"][:1], record["conversations"][1] | {"weight": one}] for one in (1, 0.5))
    names = {"heavy": [heavy], "light": [light], "both": [heavy, light, heavy]}
    for name, talks in names.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    entries = {name: {"annotation_path": str(tmp_path / f"{name}.json"), "data_path": ""} for name in names}
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}\n")
    settings = {**STEPS, "dataset_use": "heavy,light,both", "per_device_train_batch_size": 5, "max_steps": 1}
    settings["logging_steps"] = 1
    found = figures(train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", tmp_path / "registry.py", **settings))
    assert found["loss/light"] == pytest.approx(found["loss/heavy"], rel=1e-5)
    assert found["loss/both"] == pytest.approx(found["loss/heavy"], rel=1e-5)
    assert found["trained_tokens/both"] == pytest.approx(2.5 * found["trained_tokens/heavy"])
    assert found["tokens/both"] == 3 * found["tokens/heavy"]


def test_a_head_has_its_metrics_by_dataset(
    tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {**LABELLED, "task": "classification", "dataset_use": "samples", "eval_dataset_use": "held_out,samples"}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 3, "logging_steps": 3}
    both = train(tiny_checkpoint("qwen3_vl"), tmp_path / "both", labelled("classification"), **settings)
    found = figures(both, "eval_")
    for name in ("held_out", "samples"):
        one = train(
            tiny_checkpoint("qwen3_vl"),
            tmp_path / name,
            labelled("classification"),
            **{**settings, "eval_dataset_use": name},
        )
        lines = json.loads((one / "trainer_state.json").read_text())["log_history"]
        (line,) = [line for line in lines if "eval_loss" in line]
        for key in ("eval_loss", "eval_accuracy", "eval_labelled_samples"):
            assert found[f"{key}/{name}"] == pytest.approx(line[key], rel=1e-5), key
    assert "Scores: held_out" in (both / "report.html").read_text()


def test_a_resumed_run_has_the_line_of_the_one_that_was_never_stopped(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """The checkpoint stands in the middle between two log lines."""
    model = tiny_checkpoint("qwen3_vl")
    settings = {**STEPS, "dataset_use": "pictures,text", "save_strategy": "steps", "save_steps": 2}
    whole = train(model, tmp_path / "whole", registry, **settings)
    saved = json.loads((whole / "checkpoint-2" / FILE_NAME).read_text())
    assert sum(weight for _, weight, _ in saved.values()) > 0
    checkpoint = {"resume_from_checkpoint": whole / "checkpoint-2"}
    resumed = train(model, tmp_path / "resumed", registry, **settings, **checkpoint)
    assert figures(resumed) == pytest.approx(figures(whole), rel=1e-6)


ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO-3": {"deepspeed": REPOSITORY / "configs/zero3.json"},
    "FSDP2": {"fsdp": True, "fsdp_config": REPOSITORY / "configs/fsdp2.json"},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_have_the_figures_of_one(
    engine: str,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    expected: Callable[..., dict[str, float]],
) -> None:
    """ZeRO-3 and FSDP2 make copies of the model's floating-point inputs."""
    settings = {**BOTH, **ENGINES[engine], "optim": "adamw_torch", "per_device_train_batch_size": 1}
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    run = run_on_two_ranks(tmp_path, {"run": command}, engine)["run"]
    assert figures(run) == pytest.approx(expected("", "pictures", "text"), rel=1e-5)
    assert figures(run, "eval_") == pytest.approx(expected("eval_", "held_out", "mixed"), rel=1e-5)


def batch_of(*datasets: str) -> tuple[dict[str, Any], list[Origin]]:
    """Return a prepared batch of samples of two tokens with one unit each, and its origins."""
    count = len(datasets)
    borders = torch.arange(0, 2 * count + 1, 2, dtype=torch.int32)
    batch = {"num_samples": count, "sample_of_unit": torch.arange(count), "cu_seq_lens_q": borders}
    return batch, [Origin(name, "f", 1) for name in datasets]


def same(values: Tensor) -> Tensor:
    return values


def add(losses: DatasetLosses, taken: bool, **values: float) -> None:
    batch, origins = batch_of(*values)
    losses.count(batch, origins)
    losses.add(torch.tensor(list(values.values())), batch)
    losses.end_step(taken=taken)


def test_skipped_steps_do_not_count_and_absent_datasets_are_left_out() -> None:
    losses = DatasetLosses(("a", "b", "c"), "units", torch.device("cpu"))
    add(losses, True, a=1.0, b=4.0)
    add(losses, False, a=math.nan, c=2.0)
    add(losses, True, a=3.0)
    expected = {"loss/a": 2.0, "units/a": 2, "tokens/a": 4, "loss/b": 4.0, "units/b": 1, "tokens/b": 2}
    assert losses.take(same) == expected
    assert losses.take(same) == {}


def test_a_run_that_begins_again_has_the_sums_of_its_checkpoint(tmp_path: Path) -> None:
    first = DatasetLosses(("a", "gone"), "units", torch.device("cpu"))
    add(first, True, a=1.0, gone=5.0)
    first.save(tmp_path, same, writes=True)
    second = DatasetLosses(("new", "a"), "units", torch.device("cpu"))
    second.take_up(str(tmp_path))
    for _ in range(2):  # the second time after --auto_find_batch_size began the run again
        second.start_over()
        add(second, True, a=3.0)
    assert second.take(same) == {"loss/a": 2.0, "units/a": 2, "tokens/a": 4}


def test_losses_that_are_not_told_are_not_logged() -> None:
    losses = DatasetLosses(("a",), "units", torch.device("cpu"))
    batch, origins = batch_of("a")
    losses.count(batch, origins)
    losses.add(None, batch)
    losses.end_step(taken=True)
    assert losses.take(same) == {"units/a": 1, "tokens/a": 2}


def test_metrics_are_those_of_the_records_of_each_dataset() -> None:
    records = [("a", 1.0), ("b/c", 4.0), ("a", 3.0)]
    assert by_dataset(records, lambda found: {"mean": float(np.mean(found))}) == {"mean/a": 2.0, "mean/b/c": 4.0}
