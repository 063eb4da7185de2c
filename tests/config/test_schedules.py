"""Schedules are tried with their arguments before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.trainer_utils import SchedulerType

from qwenvl.config import parse_arguments
from tests.config.flags import NEEDED, parsed, rejected

EVALUATING = ("--eval_strategy", "steps", "--eval_ratio", "0.1")
NEEDS = {
    "cosine_with_min_lr": '{"min_lr": 1e-6}',
    "cosine_warmup_with_min_lr": '{"min_lr": 1e-6}',
    "warmup_stable_decay": '{"num_decay_steps": 2}',
}


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers_is_taken(name: str) -> None:
    options = ("--lr_scheduler_kwargs", NEEDS[name]) if name in NEEDS else ()
    parsed("--lr_scheduler_type", name, *options, *EVALUATING)
    if name in NEEDS:
        assert f"--lr_scheduler_type {name} without --lr_scheduler_kwargs" in rejected("--lr_scheduler_type", name)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cosine_with_min_lr", '{"min_lr": "low"}', "--lr_scheduler_kwargs {'min_lr': 'low'}"),
        ("cosine_with_min_lr", '{"min_lr": 1e-6, "power": 2}', "power"),
        ("linear", '{"min_lr": 1e-6}', "min_lr"),
        ("polynomial", '{"lr_end": 1.0}', "lr_end"),
        ("constant", '{"factor": 2}', "takes no --lr_scheduler_kwargs"),
        ("constant_with_warmup", '{"factor": 2}', "takes no --lr_scheduler_kwargs"),
    ],
)
def test_arguments_that_a_schedule_does_not_take(name: str, options: str, words: str) -> None:
    message = rejected("--lr_scheduler_type", name, "--lr_scheduler_kwargs", options)
    assert words in message and f"--lr_scheduler_type {name}" in message


@pytest.mark.parametrize("warmup", [("--warmup_ratio", "0.03"), ("--warmup_steps", "5")])
@pytest.mark.parametrize("name", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_a_warm_up_that_a_schedule_does_not_have(name: str, warmup: tuple[str, str]) -> None:
    message = rejected("--lr_scheduler_type", name, *warmup, *EVALUATING)
    assert f"--lr_scheduler_type {name} has no warm-up" in message
    parsed("--lr_scheduler_type", "constant_with_warmup", *warmup)


def test_a_learning_rate_of_a_recipe_is_read_alike_at_every_depth(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    text = "learning_rate: 2e-5\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"
    file.write_text(text)
    training = parse_arguments([str(file), *NEEDED]).training
    assert training.learning_rate == 2e-5 and training.lr_scheduler_kwargs == {"min_lr": 1e-6}
