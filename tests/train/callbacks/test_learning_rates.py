"""The learning rates that a log line shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwenvl.train.callbacks.learning_rates import LearningRates


def optimizer_of(**rates: float) -> torch.optim.Optimizer:
    """Return an optimizer with a group for each part; engines lose the names of groups in time."""
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "name": f"{part}/decay", "lr": rate} for part, rate in rates.items()
    ]
    return torch.optim.SGD(groups, lr=1.0)


@pytest.mark.parametrize(
    ("rates", "main", "parts"),
    [
        ({"vision": 1e-3, "language": 1e-3}, 5e-4, {}),
        (
            {"vision": 1e-5, "language": 1e-3},
            5e-4,
            {"learning_rate_vision": 5e-6, "learning_rate_language": 5e-4},
        ),
        ({"vision": 1e-5, "merger": 1e-4}, 5e-6, {"learning_rate_vision": 5e-6, "learning_rate_merger": 5e-5}),
    ],
    ids=["one rate", "the tower has its own", "all have their own"],
)
def test_the_rate_of_the_run_and_those_of_its_parts(
    rates: dict[str, float], main: float, parts: dict[str, float]
) -> None:
    optimizer, found = optimizer_of(**rates), LearningRates(1e-3)
    found.begin(optimizer)
    for group in optimizer.param_groups:
        group["lr"] /= 2
        del group["name"]
    assert found.read(optimizer) == pytest.approx(main)
    assert found.of_parts == pytest.approx(parts)


def test_a_schedule_that_has_begun_does_not_hide_the_rate_of_the_run() -> None:
    optimizer, found = optimizer_of(vision=1e-5, language=1e-3), LearningRates(1e-3)
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    found.begin(optimizer)
    optimizer.param_groups[1]["lr"] = 0.25
    assert found.read(optimizer) == 0.25
