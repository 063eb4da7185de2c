"""The metric of the best checkpoint: names that evaluations give, and which way is better."""

from __future__ import annotations

import inspect

import pytest

from qwenvl.config import tasks
from qwenvl.config.rules.best_metric import OF_VIEWS
from qwenvl.inference.other_images import VIEWS
from qwenvl.tasks.grounding import metrics as mask_metrics
from qwenvl.tasks.heads import metrics as task_metrics
from tests.config.flags import parsed, rejected

EVALUATING = ("--eval_strategy", "steps", "--eval_ratio", "0.1")
ANSWERING = (*EVALUATING, "--eval_generate", "10", "--eval_blind", "True")
CLASSIFYING = (*EVALUATING, "--task", "classification")


@pytest.mark.parametrize(
    ("metric", "flags", "greater"),
    [
        ("loss", EVALUATING, False),
        ("eval_loss", EVALUATING, False),
        ("exact_match", ANSWERING, True),
        ("eval_box_accuracy", ANSWERING, True),
        ("loss_blank", ANSWERING, False),
        ("eval_loss_blank/apples", ANSWERING, False),
        ("loss/apples", EVALUATING, False),
        ("accuracy/apples", CLASSIFYING, True),
        ("eval_loss_shown", ANSWERING, False),
        ("accuracy", CLASSIFYING, True),
        ("eval_rmse", (*EVALUATING, "--task", "regression"), False),
        ("r2", (*EVALUATING, "--task", "regression"), True),
    ],
)
def test_which_way_is_better(metric: str, flags: tuple[str, ...], greater: bool) -> None:
    training = parsed("--metric_for_best_model", metric, *flags).training
    assert training.greater_is_better is greater and training.metric_for_best_model == metric
    chosen = parsed("--metric_for_best_model", metric, *flags, "--greater_is_better", str(not greater)).training
    assert chosen.greater_is_better is not greater


@pytest.mark.parametrize("flags", [("--save_strategy", "best"), ("--load_best_model_at_end",)])
def test_the_loss_is_the_metric_where_none_is_named(flags: tuple[str, ...]) -> None:
    training = parsed(*flags, *EVALUATING).training
    assert (training.metric_for_best_model, training.greater_is_better) == ("loss", False)
    assert "there are none" in rejected(*flags, "--save_strategy", "best")


@pytest.mark.parametrize(
    ("metric", "flags", "words"),
    [
        ("exact_match", EVALUATING, ("evaluations of this run compute: loss.", "--eval_generate 100")),
        ("trained_tokens", EVALUATING, ("compute: loss",)),
        ("accuracy", EVALUATING, ("compute: loss",)),
        ("rmse", CLASSIFYING, ("loss, accuracy, macro_f1",)),
        ("acuracy", CLASSIFYING, ("Did you mean 'accuracy'",)),
    ],
)
def test_a_metric_that_no_evaluation_gives(metric: str, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    message = rejected("--metric_for_best_model", metric, *flags)
    assert message.startswith(f"--metric_for_best_model {metric} is not one") and all(word in message for word in words)


def test_a_direction_without_a_metric_has_no_effect() -> None:
    assert "--greater_is_better" in rejected("--greater_is_better", "False", *EVALUATING)


def test_the_names_are_those_of_the_metrics_themselves() -> None:
    assert {f"loss_{view}" for view in VIEWS} == set(OF_VIEWS)
    source = inspect.getsource(task_metrics) + inspect.getsource(mask_metrics)
    named = [name for names in tasks.METRICS.values() for name in names]
    assert [name for name in named if f'"{name}":' not in source] == []
