"""How long a run is: as many steps as the Trainer takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from qwenvl.config import TrainingArguments
from qwenvl.data.sampler import SampleOrder
from qwenvl.train.schedule import Schedule, plan_schedule, slowest_over_mean
from tests.e2e.runs import history, train


def arguments(**settings: Any) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("indices", "settings", "ranks", "expected"),
    [
        (10, {}, 1, Schedule(10, 1, 2, 5, 15)),
        (11, {}, 1, Schedule(11, 1, 2, 6, 18)),
        (11, {"gradient_accumulation_steps": 3}, 2, Schedule(11, 2, 12, 1, 3)),
        (12, {"gradient_accumulation_steps": 3}, 2, Schedule(12, 2, 12, 1, 3)),
        (13, {"gradient_accumulation_steps": 3}, 2, Schedule(13, 2, 12, 2, 6)),
        (10, {"num_train_epochs": 0.5}, 1, Schedule(10, 1, 2, 5, 3)),
        (10, {"num_train_epochs": 1.25}, 1, Schedule(10, 1, 2, 5, 7)),
        (10, {"max_steps": 1}, 1, Schedule(10, 1, 2, 5, 1)),
        (10, {"max_steps": 7, "num_train_epochs": 1}, 1, Schedule(10, 1, 2, 5, 7)),
    ],
)
def test_steps_are_rounded_up(indices: int, settings: dict[str, Any], ranks: int, expected: Schedule) -> None:
    assert plan_schedule(indices, arguments(per_device_train_batch_size=2, **settings), ranks) == expected


def test_epochs_are_the_share_of_the_data_that_is_used() -> None:
    assert Schedule(10, 1, 2, 5, 7).epochs == pytest.approx(1.4)


@given(st.integers(1, 10_000), st.one_of(st.floats(0, 1), st.integers(0, 500)))
def test_a_distance_is_rounded_as_the_trainer_rounds_its_warmup(steps: int, given: float) -> None:
    ours = Schedule(1, 1, 1, 1, steps).steps_between(given)
    assert ours == arguments(warmup_steps=given).get_warmup_steps(steps)


def test_one_is_a_step_and_not_the_whole_run() -> None:
    assert Schedule(1, 1, 1, 1, 10).steps_between(1) == 1


def test_a_run_takes_the_steps_that_are_planned(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Of four rows a step, 0.6 epochs: 1.8 steps of three."""
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 0.6, "max_steps": None}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, **settings)
    planned = plan_schedule(11, arguments(per_device_train_batch_size=4, num_train_epochs=0.6), 1)
    assert len(history(folder)) == planned.steps == 2


def test_the_slowest_rank_is_compared_with_the_mean() -> None:
    """Two ranks with batches of one: rank 0 has 3 + 1 to do while rank 1 has 1 + 1, one after the other."""
    costs, order = np.array([3.0, 1.0, 1.0, 1.0]), SampleOrder(4, shuffle=False)
    args = arguments(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert slowest_over_mean(order, costs, args, 1) == 1.0
    assert slowest_over_mean(order, costs, args, 2) == pytest.approx(4 / 3)


def test_the_steps_compared_are_those_of_the_first_epoch() -> None:
    """Of four indices in two steps, one alone costs anything: whichever rank has it works, and the other one waits."""
    args = arguments(per_device_train_batch_size=1)
    pairs = np.array([9.0, 9.0, 1.0, 1.0])
    found = set()
    for seed in range(20):
        order = SampleOrder(4, seed=seed)
        steps = pairs[order.steps(0, 2)].reshape(2, 2)
        expected = steps.max(1).sum() / steps.mean(1).sum()
        assert slowest_over_mean(order, pairs, args, 2) == pytest.approx(expected)
        found.add(round(expected, 3))
    assert len(found) == 2
