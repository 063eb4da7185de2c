"""Check the metric of the best checkpoint, and whether greater values of it are better."""

from __future__ import annotations

from collections.abc import Iterable

from qwenvl.utils.errors import UserError, nearest

OF_DATASET = "/"
"""Between a figure and the dataset that it is of: ``loss/apples``."""

OF_VIEWS = ("loss_shown", "loss_blank", "loss_swapped")
"""Losses that ``--eval_blind`` adds."""

_LOWER_IS_BETTER = ("loss", "loss_shown", "loss_blank", "loss_swapped", "mae", "rmse")


def plain_name(metric: str) -> str:
    """Return the name of a metric without the prefix of logs."""
    return metric.removeprefix("eval_")


def greater_is_better(metric: str) -> bool:
    """Return whether greater values of a metric are better; transformers decides by whether its name ends in loss."""
    return plain_name(metric).partition(OF_DATASET)[0] not in _LOWER_IS_BETTER


def available_metrics(
    of_task: Iterable[str], answers: Iterable[str], *, blind: bool, datasets: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the metrics that evaluations of a run compute: of all datasets, then those of single ones.

    Args:
        of_task: Metrics of the task of the run, where there is one.
        answers: Metrics of generated answers, if there are any; with those of single datasets, where they are known.
        blind: Whether the losses with other images are computed.
        datasets: Evaluation datasets with samples, where they are known.
    """
    of_all = ("loss", *of_task)
    of_single = (f"{name}{OF_DATASET}{dataset}" for dataset in datasets for name in of_all)
    found = (*of_all, *answers, *(OF_VIEWS if blind else ()), *of_single)
    return tuple(sorted(found, key=lambda name: OF_DATASET in name))


def require_metric(metric: str, available: Iterable[str], advice: str = "") -> None:
    """Check that evaluations compute a metric; its dataset only where the available ones name any.

    Raises:
        UserError: They do not.
    """
    name, of_all, of_single = plain_name(metric), list[str](), list[str]()
    for one in available:
        (of_single if OF_DATASET in one else of_all).append(one)
    if not of_single:
        name = name.partition(OF_DATASET)[0]
    known = of_single if OF_DATASET in name else of_all
    if name not in known:
        raise UserError(
            f"--metric_for_best_model {metric} is not one that evaluations of this run compute: {', '.join(known)}."
            f"{nearest(name, known)}{advice}"
        )
