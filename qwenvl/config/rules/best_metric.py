"""Check the metric of the best checkpoint, and whether greater values of it are better."""

from __future__ import annotations

from collections.abc import Iterable

from qwenvl.utils.errors import UserError, nearest

OF_VIEWS = ("loss_shown", "loss_blank", "loss_swapped")
"""Losses that ``--eval_blind`` adds."""

_LOWER_IS_BETTER = ("loss", "loss_shown", "loss_blank", "loss_swapped", "mae", "rmse")


def plain_name(metric: str) -> str:
    """Return the name of a metric without the prefix of logs."""
    return metric.removeprefix("eval_")


def greater_is_better(metric: str) -> bool:
    """Return whether greater values of a metric are better; transformers decides by whether its name ends in loss."""
    return plain_name(metric) not in _LOWER_IS_BETTER


def available_metrics(of_task: Iterable[str], answers: Iterable[str], *, blind: bool) -> tuple[str, ...]:
    """Return the metrics that evaluations of a run compute.

    Args:
        of_task: Metrics of the task of the run, where there is one.
        answers: Metrics of generated answers, if there are any.
        blind: Whether the losses with other images are computed.
    """
    return ("loss", *of_task, *answers, *(OF_VIEWS if blind else ()))


def require_metric(metric: str, available: Iterable[str], advice: str = "") -> None:
    """Check that evaluations compute a metric.

    Raises:
        UserError: They do not.
    """
    known = tuple(available)
    if plain_name(metric) not in known:
        raise UserError(
            f"--metric_for_best_model {metric} is not one that evaluations of this run compute: {', '.join(known)}."
            f"{nearest(plain_name(metric), known)}{advice}"
        )
