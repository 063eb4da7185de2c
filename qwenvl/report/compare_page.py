"""Runs side by side as one page: what differs between them, their scores, and their curves over one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from qwenvl.metrics.bootstrap import Interval
from qwenvl.report.chart import STYLES, Chart, Line
from qwenvl.report.curves import History, drawn_keys, series
from qwenvl.report.html import build_page, figures, table

ABSENT = "-"
"""Value of a setting, dataset or package that a run does not have."""


@dataclass(frozen=True)
class RunRecord:
    """The records of one run.

    Args:
        name: Name in tables and legends.
        settings: Settings that its recipe names; all others are defaults.
        versions: Versions of packages, by name.
        data: Description of the rows used of each dataset, by its name and use.
        history: Entries of the log.
        scores: Scores of the last evaluation, by dataset and metric.
    """

    name: str
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    data: Mapping[str, str]
    history: History
    scores: Mapping[str, Interval] = field(default_factory=dict)


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return a row (kind, name, value of each run) for everything that is not the same in all runs."""
    found = list[tuple[str, ...]]()
    kinds = (
        ("setting", [run.settings for run in runs], "default"),
        ("data", [run.data for run in runs], ABSENT),
        ("version", [run.versions for run in runs], ABSENT),
    )
    for kind, values, absent in kinds:
        for name in dict.fromkeys(key for one in values for key in one):
            row = [one.get(name, absent) for one in values]
            if len(set(row)) > 1:
                found.append((kind, name, *row))
    return found


def results(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return a row (name, value of each run) for the loss, the speed, and every score with its interval."""
    rows = [("optimizer steps", *(_steps(run) for run in runs))]
    for key, title in (("train_loss", "training loss, mean of the run"), ("eval_loss", "evaluation loss, last")):
        rows.append((title, *(_last(run, key) for run in runs)))
    rows.append(("evaluation loss, lowest", *(_lowest(run, "eval_loss") for run in runs)))
    rows.append(("tokens per second, last", *(_last(run, "tokens_per_second") for run in runs)))
    names = dict.fromkeys(name for run in runs for name in run.scores)
    rows += [(name, *(_score(run.scores.get(name)) for run in runs)) for name in names]
    return [row for row in rows if any(value != ABSENT for value in row[1:])]


def _steps(run: RunRecord) -> str:
    steps = [int(line["step"]) for line in run.history if "step" in line]
    return f"{max(steps):,}" if steps else ABSENT


def _last(run: RunRecord, key: str) -> str:
    points = series(run.history, key)
    return f"{points[-1][1]:.4g}" if points else ABSENT


def _lowest(run: RunRecord, key: str) -> str:
    points = series(run.history, key)
    if not points:
        return ABSENT
    step, value = min(points, key=lambda point: point[1])
    return f"{value:.4g} at step {step:,g}"


def _score(interval: Interval | None) -> str:
    if interval is None:
        return ABSENT
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def charts(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """Yield a chart for each value that at least one run has logged twice, with a line for each run.

    More runs than lines that look different are drawn in several charts.
    """
    for key in drawn_keys([line for run in runs for line in run.history]):
        lines = [Line(run.name, series(run.history, key)) for run in runs]
        if not any(len(line.finite) > 1 for line in lines):
            continue
        groups = [lines[start : start + STYLES] for start in range(0, len(lines), STYLES)]
        for number, group in enumerate(groups, start=1):
            title = f"{key} ({number} of {len(groups)})" if len(groups) > 1 else key
            yield Chart(title, tuple(line for line in group if line.points), log="loss" in key or key == "grad_norm")


def build_compare_page(runs: Sequence[RunRecord]) -> str:
    """Return the comparison as an HTML page."""
    names = [run.name for run in runs]
    different = differences(runs)
    told = table(("Kind", "Name", *names), different) if different else '<p class="note">Nothing differs.</p>'
    scored = table(("Result", *names), results(runs))
    note = (
        "Settings that no run changed, and equal ones, are left out. Scores are those of the last evaluation, with "
        "their 95% confidence intervals."
    )
    return build_page(
        f"{len(runs)} runs side by side",
        f'<section class="panel"><h2>Results</h2>{scored}</section>',
        f'<section class="panel"><h2>What differs</h2>{told}<p class="note">{escape(note)}</p></section>',
        f"<section><h2>Curves</h2>{figures(list(charts(runs)))}</section>",
    )
