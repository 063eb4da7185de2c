"""The mean loss between two log lines, over skipped steps and interruptions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwenvl.train.running_loss import FILE_NAME, RunningLoss


def loss_of(*steps: Sequence[float], skipped: Sequence[int] = ()) -> RunningLoss:
    """Steps of micro-batches, of which some are skipped."""
    running = RunningLoss(torch.device("cpu"))
    for number, parts in enumerate(steps):
        for part in parts:
            running.add(torch.tensor(part))
        running.end_step(taken=number not in skipped)
    return running


def unchanged(value: Tensor) -> Tensor:
    return value


def test_the_loss_of_a_step_is_the_sum_of_its_parts_until_it_ends() -> None:
    running = loss_of([1.0])
    weight = torch.tensor(3.0, requires_grad=True)
    for _ in range(2):
        running.add(weight * 1)
    assert running.of_step.item() == 6 and not running.of_step.requires_grad
    running.end_step(taken=True)
    assert running.of_step.item() == 0


def test_the_mean_is_of_the_steps_since_the_last_one() -> None:
    running = loss_of([1.0, 2.0], [5.0])
    assert running.take(lambda total: total / 2) == 2.0
    running.add(torch.tensor(7.0))
    running.end_step(taken=True)
    assert running.take(unchanged) == 7.0


def test_skipped_steps_are_counted_and_left_out() -> None:
    running = loss_of([1.0], [math.nan], [math.inf], [3.0], skipped=[1, 2])
    assert running.skipped == 2
    assert running.take(unchanged) == 2.0
    assert running.skipped == 0
    assert math.isnan(loss_of([math.nan], skipped=[0]).take(unchanged))


def test_what_was_not_logged_yet_is_taken_up(tmp_path: Path) -> None:
    loss_of([1.0], [2.0], [math.nan], skipped=[2]).save(tmp_path, writes=True)
    running = loss_of([100.0], [100.0])
    running.take_up(str(tmp_path))
    assert running.skipped == 1
    running.add(torch.tensor(6.0))
    running.end_step(taken=True)
    assert running.take(unchanged) == 3.0


def test_only_who_writes_writes_and_other_checkpoints_hold_nothing(tmp_path: Path) -> None:
    loss_of([1.0]).save(tmp_path, writes=False)
    assert not list(tmp_path.iterdir())
    running = loss_of([4.0])
    running.take_up(str(tmp_path))
    assert running.take(unchanged) == 4.0


@pytest.mark.parametrize(("rank", "expected"), [("0", 3.0), ("1", 7.0)])
def test_each_rank_takes_up_its_own_and_other_ranks_the_mean(
    rank: str, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older checkpoint does not say how many steps were skipped."""
    (tmp_path / FILE_NAME).write_text(json.dumps({"steps": 1, "sums": [3.0, 7.0]}))
    running = loss_of([1.0])
    running.take_up(str(tmp_path))
    assert running.skipped == 0
    assert running.take(unchanged) == 5.0
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    running.take_up(str(tmp_path))
    assert running.take(unchanged) == expected
