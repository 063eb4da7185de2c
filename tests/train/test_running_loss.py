"""The losses that are logged: of the steps since the last line, and of the whole run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenvl.train import trainer
from qwenvl.train.running_loss import FILE_NAME, RunningLoss
from tests.e2e.runs import history, train


def same(value: Tensor) -> Tensor:
    return value


def taken(*losses: float) -> RunningLoss:
    running = RunningLoss(torch.device("cpu"))
    for loss in losses:
        running.add(torch.tensor(loss))
        running.end_step(taken=math.isfinite(loss))
    return running


def test_skipped_steps_are_in_neither_mean() -> None:
    running = taken(1.0, math.nan, 3.0)
    assert running.take(same) == {"loss": 2.0, "skipped_steps": 1}
    running.add(torch.tensor(8.0))
    running.end_step(taken=True)
    assert running.of_run(same) == 4.0
    assert running.take(same) == {"loss": 8.0}
    assert running.of_run(same) == 4.0


def test_losses_apart_are_logged_beside_the_loss_and_resumed(tmp_path: Path) -> None:
    def more(running: RunningLoss, loss: float, mtp: float) -> None:
        running.add(torch.tensor(loss), {"mtp_loss": torch.tensor(mtp)})
        running.end_step(taken=True)

    first = RunningLoss(torch.device("cpu"), ["mtp_loss"])
    more(first, 1.0, 10.0)
    assert first.take(same) == {"loss": 1.0, "mtp_loss": 10.0}
    more(first, 2.0, 20.0)
    first.save(tmp_path, writes=True)
    for apart, wanted in ((["mtp_loss"], {"loss": 3.0, "mtp_loss": 30.0}), ([], {"loss": 3.0})):
        second = RunningLoss(torch.device("cpu"), apart)
        second.take_up(str(tmp_path))
        second.add(torch.tensor(4.0), {"mtp_loss": torch.tensor(40.0)})
        assert second.of_step.item() == 4.0
        second.end_step(taken=True)
        assert second.take(same) == wanted
        assert second.of_run(same) == 7.0 / 3


def test_without_a_taken_step_there_is_no_mean() -> None:
    running = taken(math.inf)
    assert math.isnan(running.of_run(same)) and math.isnan(running.take(same)["loss"])


def test_a_resumed_run_has_the_means_of_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    first = taken(1.0, 3.0)
    first.take(same)
    first.add(torch.tensor(5.0))
    first.end_step(taken=True)
    first.save(tmp_path, writes=True)
    second = taken(100.0)
    second.take_up(str(tmp_path))
    for _ in range(2):  # the second time after --auto_find_batch_size began the run again
        second.start_over()
        second.add(torch.tensor(7.0))
        second.end_step(taken=True)
    assert second.of_run(same) == 4.0
    assert second.take(same) == {"loss": 6.0}


def test_the_loss_of_a_step_is_the_sum_of_its_parts_until_it_ends() -> None:
    running = taken(1.0)
    weight = torch.tensor(3.0, requires_grad=True)
    for _ in range(2):
        running.add(weight * 1)
    assert running.of_step.item() == 6 and not running.of_step.requires_grad
    running.end_step(taken=False)
    assert running.of_step.item() == 0
    assert running.take(same) == {"loss": 1.0, "skipped_steps": 1}


def test_both_means_are_over_the_ranks() -> None:
    running = taken(1.0, 3.0)
    assert running.of_run(lambda total: total * 10) == 20.0
    assert running.take(lambda total: total * 10) == {"loss": 20.0}
    assert running.of_run(same) == 20.0


def test_only_who_writes_writes_and_other_checkpoints_hold_nothing(tmp_path: Path) -> None:
    running = taken(4.0)
    running.save(tmp_path, writes=False)
    assert not list(tmp_path.iterdir())
    running.take_up(str(tmp_path))
    assert running.take(same) == {"loss": 4.0}


def test_skipped_steps_that_were_not_logged_yet_are_taken_up(tmp_path: Path) -> None:
    taken(1.0, math.nan).save(tmp_path, writes=True)
    running = taken(math.nan, math.nan)
    running.take_up(str(tmp_path))
    assert running.take(same) == {"loss": 1.0, "skipped_steps": 1}


@pytest.mark.parametrize(("rank", "expected"), [("0", 3.0), ("1", 7.0)])
def test_each_rank_takes_up_its_own_sum_and_other_ranks_the_mean(
    rank: str, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older checkpoint says neither what was skipped nor what was logged."""
    (tmp_path / FILE_NAME).write_text(json.dumps({"steps": 1, "sums": [3.0, 7.0]}))
    running = taken(1.0)
    running.take_up(str(tmp_path))
    assert running.of_run(same) == 5.0
    assert running.take(same) == {"loss": 5.0}
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    running.take_up(str(tmp_path))
    assert running.take(same) == {"loss": expected}


def test_a_resumed_run_logs_the_loss_of_the_whole_run(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 3}
    model = tiny_checkpoint("qwen3_vl")
    whole = train(model, tmp_path / "whole", registry, **settings)
    losses = history(train(model, tmp_path / "each", registry, **{**settings, "logging_steps": 1}))
    train(model, tmp_path / "parts", registry, **{**settings, "max_steps": 2})
    parts = train(model, tmp_path / "parts", registry, **settings)
    expected = [pytest.approx(sum(losses) / 4, rel=1e-5)]
    assert history(whole, "train_loss") == expected
    assert history(parts, "train_loss") == expected


class OutOfMemory:
    """Runs out of memory once, in the second micro-batch of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count, self.loss = at, 0, trainer.batch_loss
        monkeypatch.setattr(trainer, "batch_loss", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self.at:
            raise RuntimeError("CUDA out of memory.")
        return self.loss(*args, **kwargs)


def test_what_ran_before_memory_ran_out_is_in_no_figure(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try logs nothing: its first step ends within a window of two, its second one runs out of memory."""
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "learning_rate": 1e-12,
        "vision_tower_lr": 1e-13,
        "optim": "sgd",
        "max_steps": 2,
        "lr_scheduler_type": "linear",
    }
    model = tiny_checkpoint("qwen3_vl")
    right = train(model, tmp_path / "right", registry, **settings, per_device_train_batch_size=1)
    OutOfMemory(monkeypatch, at=4)
    found = train(
        model, tmp_path / "found", registry, **settings, per_device_train_batch_size=2, auto_find_batch_size=True
    )
    for figure in ("loss", "train_loss", "learning_rate", "learning_rate_vision", "total_flos"):
        assert history(found, figure) == pytest.approx(history(right, figure), rel=1e-5, abs=0), figure
