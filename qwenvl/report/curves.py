"""Charts of the values that a run has logged: known ones in groups, all others in charts of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenvl.config.rules.best_metric import OF_DATASET
from qwenvl.report.chart import STYLES, Chart, Line, Point

History = Sequence[Mapping[str, Any]]
"""Entries of the log: values by name, each with its ``step``."""


@dataclass(frozen=True)
class _Plan:
    """A chart of known log entries.

    Args:
        title: Title of the chart.
        names: Names of the lines, by the keys of their values in the log.
        unit: Unit of the values.
        log: See :class:`qwenvl.report.chart.Chart`.
        percent: See :class:`qwenvl.report.chart.Chart`.
    """

    title: str
    names: Mapping[str, str]
    unit: str = ""
    log: bool = False
    percent: bool = False


TRAINED_TOKENS = "trained_tokens"
"""Unit over which the loss of language modelling is averaged."""

_TRAINING = (
    _Plan("Loss", {"loss": "training", "eval_loss": "evaluation"}, log=True),
    _Plan("Gradient norm", {"grad_norm": "gradient norm"}, log=True),
    _Plan("Tokens", {"tokens_per_second": "all", "trained_tokens_per_second": "trained"}, "per second, all devices"),
    _Plan("Samples", {"samples_per_second": "samples"}, "per second, all devices"),
    _Plan("Model FLOPs utilization", {"mfu": "all", "mfu_vision": "vision", "mfu_language": "language"}, percent=True),
    _Plan(
        "Waiting for data",
        {"data_wait_share": "mean of the ranks", "data_wait_share_max": "slowest rank"},
        "share of the time",
        percent=True,
    ),
    _Plan("Padding", {"padding_share": "padding"}, "share of the positions", percent=True),
    _Plan("Peak memory", {"peak_memory_gib": "fullest device"}, "GiB"),
)
_BLIND = _Plan(
    "Loss by image shown",
    {"eval_loss_shown": "its own", "eval_loss_blank": "blank", "eval_loss_swapped": "another sample's"},
    "nats per trained token",
    log=True,
)
RATE = "learning_rate"
PART_RATE = f"{RATE}_"
"""Prefix of the keys of learning rates of single parts."""

_UNSHOWN = {"step", "epoch", "total_flos", RATE, "eval_answered_samples", "eval_cut_answers", "skipped_steps"}
_UNSHOWN_ENDS = ("_per_device", "_runtime")
_MOST_OTHERS = 12


def series(history: History, key: str) -> tuple[Point, ...]:
    """Return (step, value) of every log entry that has the key, in the order of steps."""
    found = [
        (float(line["step"]), float(line[key])) for line in history if _is_number(line.get(key)) and "step" in line
    ]
    return tuple(sorted(found, key=lambda point: point[0]))


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # some versions write NaN and infinity to state files as strings
        try:
            float(value)
        except ValueError:
            return False
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def training_charts(history: History, unit: str = TRAINED_TOKENS) -> list[Chart]:
    """Return the charts of training whose values were logged.

    Args:
        history: Entries of the log.
        unit: Unit over which the loss is averaged, in the plural.
    """
    first, *rest = (_chart(history, plan) for plan in _TRAINING)
    loss = replace(first, unit=_loss_unit(unit))
    others = (
        Chart(_title(key), (Line(_title(key), series(history, key)),)) for key in _others(history, eval_too=False)
    )
    return [chart for chart in (loss, _rates(history), *rest, *others) if _has_values(chart)]


def evaluation_charts(history: History, unit: str = TRAINED_TOKENS) -> list[Chart]:
    """Return the charts of evaluation results other than the loss; see :func:`training_charts`."""
    found = _others(history, eval_too=True)
    keys = [key for key in found if key.startswith("eval_") and key != f"eval_{unit}"]
    lines = {key: Line(_title(key), series(history, key)) for key in keys if key not in _BLIND.names}
    shares = [line for line in lines.values() if all(0 <= value <= 1 for _, value in line.finite)]
    rest = [line for line in lines.values() if line not in shares]
    scores = [shares[start : start + STYLES] for start in range(0, len(shares), STYLES)]
    charts = [Chart("Scores", tuple(group), percent=True) for group in scores]
    charts += [Chart(line.name, (line,)) for line in rest]
    return [chart for chart in (*charts, _chart(history, _BLIND)) if _has_values(chart)]


def drawn_keys(history: History) -> list[str]:
    """Return the keys of all values that a report draws, in the order of its charts."""
    known = [key for plan in _TRAINING for key in plan.names]
    rates = [RATE, *dict.fromkeys(key for line in history for key in line if key.startswith(PART_RATE))]
    others = [*_others(history, eval_too=False), *_others(history, eval_too=True)]
    logged = dict.fromkeys(key for line in history for key in line if OF_DATASET in key)
    losses = [key for key in logged if key.partition(OF_DATASET)[0] in known[:2]]
    return list(dict.fromkeys([*known[:2], *losses, *rates, *known[2:], *others]))


def dataset_charts(history: History, unit: str = TRAINED_TOKENS) -> list[Chart]:
    """Return charts of single datasets: of each its loss, and its scores if evaluations give any.

    The values are those with keys such as ``loss/apples``. Where training and evaluation have a single dataset each,
    the other charts show the same.
    """
    keys = [key for key in dict.fromkeys(key for line in history for key in line) if OF_DATASET in key]
    names = list(dict.fromkeys(key.partition(OF_DATASET)[2] for key in keys))
    figures = list(dict.fromkeys(key.partition(OF_DATASET)[0] for key in keys))
    charts = []
    for name in names if len(keys) > len(figures) else ():
        losses = {f"{key}{OF_DATASET}{name}": text for key, text in _TRAINING[0].names.items()}
        charts.append(_chart(history, _Plan(f"Loss: {name}", losses, _loss_unit(unit), log=True)))
        found = {one: series(history, f"{one}{OF_DATASET}{name}") for one in figures if one.startswith("eval_")}
        shares = [
            Line(_title(key), points)
            for key, points in found.items()
            if key != "eval_loss" and key not in _BLIND.names and points and all(0 <= value <= 1 for _, value in points)
        ]
        charts.append(Chart(f"Scores: {name}", tuple(shares[:STYLES]), percent=True))
        blind = {f"{key}{OF_DATASET}{name}": text for key, text in _BLIND.names.items()}
        charts.append(_chart(history, replace(_BLIND, title=f"{_BLIND.title}: {name}", names=blind)))
    return [chart for chart in charts if _has_values(chart)]


def _loss_unit(unit: str) -> str:
    return "nats per trained token" if unit == TRAINED_TOKENS else f"mean of the {unit.replace('_', ' ')}"


def _rates(history: History) -> Chart:
    parts = list(dict.fromkeys(key for line in history for key in line if key.startswith(PART_RATE)))
    lines = [Line(key.removeprefix(PART_RATE), series(history, key)) for key in parts]
    return Chart("Learning rate", tuple(lines or [Line("all parts", series(history, RATE))]))


def _chart(history: History, plan: _Plan) -> Chart:
    lines = [Line(name, series(history, key)) for key, name in plan.names.items()]
    return Chart(plan.title, tuple(line for line in lines if line.points), plan.unit, plan.log, plan.percent)


def _has_values(chart: Chart) -> bool:
    return any(line.points for line in chart.lines)


def _others(history: History, *, eval_too: bool) -> Iterator[str]:
    """Yield the first keys that no chart above draws."""
    known = _UNSHOWN.union(*(plan.names for plan in _TRAINING))
    keys = dict.fromkeys(key for line in history for key in line)
    kinds = ("train_", PART_RATE) if eval_too else ("train_", PART_RATE, "eval_")
    found = [
        key
        for key in keys
        if key not in known
        and OF_DATASET not in key
        and not key.startswith(kinds)
        and not key.endswith(_UNSHOWN_ENDS)
        and not (key.startswith("eval_") and key.endswith("_per_second"))
        and any(math.isfinite(value) for _, value in series(history, key))
    ]
    yield from found[:_MOST_OTHERS]


def _title(key: str) -> str:
    return key.removeprefix("eval_").replace("_", " ")
