"""The loss of each sample each time it was trained: that of the sample alone, each once, however the run went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qwenvl.tasks.objective import causal_loss
from qwenvl.train.records.sample_losses import FILE_NAME, SampleLosses, read_sample_losses
from qwenvl.train.trainer import Trainer
from qwenvl.utils.errors import Origin, UserError
from tests.e2e.labelled import SETTINGS as LABELLED
from tests.e2e.runs import flags, run_on_two_ranks, train

# Eleven samples; weights hardly move, so that a loss is that of the starting model.
STILL: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-9, "log_sample_losses": True}
EPOCHS: dict[str, Any] = {**STILL, "max_steps": 12, "logging_steps": 5}  # two epochs of six steps


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_sample_losses(folder / FILE_NAME).to_pylist()
    return found


def by_line(folder: Path) -> dict[tuple[int, int], tuple[float, float]]:
    """Return (loss, tokens) by (epoch, line), none of which stands there twice."""
    found = {(row["epoch"], row["line"]): (row["loss"], row["tokens"]) for row in rows(folder)}
    assert len(found) == len(rows(folder))
    return found


@pytest.fixture
def alone(trainer_of: Callable[..., Trainer]) -> dict[int, tuple[float, int]]:
    """Loss and trained tokens of each sample by its line, from batches of one sample."""
    trainer = trainer_of(per_device_train_batch_size=1)
    found = {}
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            kept = {name: value for name, value in batch.items() if name not in ("events", "error", "origins")}
            loss = causal_loss(trainer.model, kept, num_trained_tokens=1.0).item()
            found[batch["origins"][0].line] = (loss, batch["num_units"])
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"data_flatten": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"data_packing": True, "model_max_length": 128, "max_steps": None, "num_train_epochs": 2, "logging_steps": 1},
    ],
    ids=["padded", "flattened", "packed"],
)
def test_each_sample_has_its_own_loss_once_an_epoch(
    layout: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    alone: dict[int, tuple[float, int]],
) -> None:
    run = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **{**EPOCHS, **layout})
    found = by_line(run)
    assert len(alone) == 11 and set(found) == {(epoch, line) for epoch in (0, 1) for line in alone}
    for (_, line), values in found.items():
        assert values == pytest.approx(alone[line], rel=1e-5)
    first = rows(run)[0]
    assert first["dataset"] == "mixed" and first["file"] == str(registry.parent / "mixed.json")
    assert all(row["id"] == f"sample-{row['line'] - 1}" for row in rows(run))
    assert [row["step"] for row in rows(run)] == sorted(row["step"] for row in rows(run))


def test_a_step_that_is_trained_again_stands_there_once(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """The run goes on from its second checkpoint, as if what came after it had been lost."""
    model, saving = tiny_checkpoint("qwen3_vl"), {**EPOCHS, "save_strategy": "steps", "save_steps": 4}
    run = train(model, tmp_path / "run", registry, **saving)
    whole = rows(run)
    train(model, run, registry, **saving, resume_from_checkpoint=run / "checkpoint-8")
    assert rows(run) == whole
    train(model, run, registry, **{**saving, "max_steps": 5}, resume_from_checkpoint=run / "checkpoint-4")
    assert rows(run) == [row for row in whole if row["step"] <= 5]


def test_a_new_run_in_the_folder_begins_anew(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    settings = {**EPOCHS, "max_steps": 1}
    run = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    train(tiny_checkpoint("qwen3_vl"), run, registry, **settings)
    assert len(rows(run)) == 2
    train(tiny_checkpoint("qwen3_vl"), run, registry, **{**settings, "log_sample_losses": False})
    assert not (run / FILE_NAME).exists()


@pytest.mark.parametrize("task", ["classification", "ranking"])
def test_a_label_has_the_loss_of_its_sample(
    task: str, tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    """The losses of a step of all samples add up to its mean, and those of single samples are their own."""
    settings = {**LABELLED, **STILL, "task": task, "max_steps": 1}
    whole, single = (
        by_line(
            train(
                tiny_checkpoint("qwen3_vl"),
                tmp_path / str(size),
                labelled(task),
                **settings,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=11 // size,
                data_flatten=size > 1,
            )
        )
        for size in (11, 1)
    )
    assert len(whole) == 11 and {tokens for _, tokens in whole.values()} == {1}
    assert {key: loss for key, (loss, _) in whole.items()} == pytest.approx(
        {key: loss for key, (loss, _) in single.items()}, rel=1e-5
    )
    assert np.std([loss for loss, _ in whole.values()]) > 0


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    model, saving = tiny_checkpoint("qwen3_vl"), {**EPOCHS, "save_strategy": "steps", "save_steps": 4}
    single = rows(train(model, tmp_path / "single", registry, **saving))
    split = {**saving, "per_device_train_batch_size": 1}
    again = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-4"}
    commands = {
        "whole": flags(model, tmp_path / "whole", registry, **split),
        "again": [*flags(model, tmp_path / "whole", registry, **split, **again)],
    }
    run_on_two_ranks(tmp_path, commands, "DDP")
    found = rows(tmp_path / "whole")
    losses = [[row.pop("loss") for row in one] for one in (found, single)]
    assert found == single
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_liger_kernel_is_refused(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path, registry, log_sample_losses=True, use_liger_kernel=True)
    assert "Leave --use_liger_kernel out" in fail(command)


def step(losses: SampleLosses, number: int, *values: float, taken: bool = True) -> None:
    """Add a step of one batch of samples, a token each."""
    batch = {"num_samples": len(values), "sample_of_unit": torch.arange(len(values))}
    losses.count(batch, [Origin("a", "f", line) for line in range(1, len(values) + 1)])
    losses.add(torch.tensor(values, dtype=torch.float64))
    losses.end_step(number, 0, taken=taken)


def test_a_skipped_step_has_no_rows(tmp_path: Path) -> None:
    losses = SampleLosses(str(tmp_path), wanted=True)
    step(losses, 1, 1.0, 2.0)
    step(losses, 2, float("nan"), taken=False)
    losses.collect()
    step(losses, 3, 3.0)
    losses.write()
    losses.write()
    assert [(row["step"], row["line"], row["loss"]) for row in rows(tmp_path)] == [(1, 1, 1), (1, 2, 2), (3, 1, 3)]


def test_a_run_that_begins_again_keeps_what_was_before_its_checkpoint(tmp_path: Path) -> None:
    first = SampleLosses(str(tmp_path), wanted=True)
    for number in (1, 2, 3):
        step(first, number, float(number))
    first.write()
    second = SampleLosses(str(tmp_path), wanted=True)
    second.take_up(2)
    step(second, 3, 30.0)
    second.write()
    second.start_over()  # --auto_find_batch_size
    step(second, 3, 33.0)
    second.write()
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 33]


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no table")
    with pytest.raises(UserError, match="cannot be read"):
        read_sample_losses(tmp_path / "a")
    pq.write_table(pa.table({"loss": [1.0]}), tmp_path / "b")
    with pytest.raises(UserError, match="no column dataset"):
        read_sample_losses(tmp_path / "b")
