"""The report of a training run as one page: its curves, answers, data, trained parameters and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from qwenvl.evaluate.answer_log import Answered
from qwenvl.models.trainable.freezing import ModuleSummary
from qwenvl.report.answers import OpenMedia, answers_section
from qwenvl.report.chart import Chart
from qwenvl.report.curves import TRAINED_TOKENS, History, dataset_charts, evaluation_charts, series, training_charts
from qwenvl.report.html import build_page, figures, shorten, table
from qwenvl.report.scales import short

LISTED = 30
"""Most left-out samples that are listed."""

SHOWN_WARNINGS = 30
_LONGEST_REASON = 500


@dataclass(frozen=True)
class Data:
    """The training and evaluation data of a run.

    Args:
        rows: Tuples of (dataset, use, rows used, rows in all, usable samples in the used rows or None).
        events: Tuples of (dataset, event, number of samples).
        left_out: Records of the first samples that were left out.
        num_left_out: Number of all samples that were left out.
        file: Name of the file that lists all of them.
    """

    rows: Sequence[tuple[str, str, int, int, int | None]]
    events: Sequence[tuple[str, str, int]] = ()
    left_out: Sequence[Mapping[str, Any]] = ()
    num_left_out: int = 0
    file: str = ""


@dataclass(frozen=True)
class Setup:
    """The command, settings, versions and devices of a run.

    Args:
        command: Command that starts the run again.
        given: Settings that the user gave.
        settings: All other settings; may contain the given ones too.
        versions: Versions of packages, by name.
        devices: Description of the devices.
        modules: Parts of the model with their trainable parameters.
        adapters: Numbers of trained parameters in adapters, by part.
        unit: Unit over which the loss is averaged, in the plural.
    """

    command: str
    given: Mapping[str, str]
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    devices: str
    modules: Sequence[ModuleSummary]
    adapters: Mapping[str, int] = field(default_factory=dict)
    unit: str = TRAINED_TOKENS


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Args:
        title: Title of the page.
        status: Progress of the run, a sentence.
        history: Entries of the log.
        data: Training and evaluation data.
        setup: Command, settings, versions and devices.
        warnings: Warnings of the run.
        answers: Answers at the evaluations.
        open_media: Function that opens the media of an answered sample.
    """

    title: str
    status: str
    history: History
    data: Data
    setup: Setup
    warnings: Sequence[str] = ()
    answers: Sequence[Answered] = ()
    open_media: OpenMedia = lambda line: f"{len(line.media)} images or videos"


def build_run_page(run: Run) -> str:
    """Return the report as an HTML page."""
    unit = run.setup.unit
    charts = (*training_charts(run.history, unit), *evaluation_charts(run.history, unit))
    return build_page(
        run.title,
        f"<p>{escape(run.status)}</p>{_tiles(run.history)}",
        _warnings(run),
        f"<section><h2>Curves</h2>{figures(charts)}</section>",
        _by_dataset(dataset_charts(run.history, unit)),
        answers_section(run.answers, run.open_media),
        _data(run.data),
        _modules(run.setup),
        _setup(run.setup),
    )


def _tiles(history: History) -> str:
    """Return the latest values of the most important metrics."""
    wanted = {
        "loss": ("training loss", 1, ""),
        "eval_loss": ("evaluation loss", 1, ""),
        "tokens_per_second": ("tokens per second", 1, ""),
        "mfu": ("MFU", 100, "%"),
        "data_wait_share": ("waiting for data", 100, "%"),
        "peak_memory_gib": ("peak memory", 1, " GiB"),
    }
    found = [(key, title, factor, unit, series(history, key)) for key, (title, factor, unit) in wanted.items()]
    tiles = "".join(
        f"<div><dt>{title}</dt><dd>{short(float(f'{factor * points[-1][1]:.4g}'))}{unit}</dd></div>"
        for _, title, factor, unit, points in found
        if points
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _warnings(run: Run) -> str:
    skipped = sum(int(count) for _, count in series(run.history, "skipped_steps"))
    told = list(run.warnings)
    if skipped:
        which = "1 step was skipped: its" if skipped == 1 else f"{skipped:,} steps were skipped: their"
        told.insert(0, f"{which} loss or gradient was not finite.")
    if not told:
        return ""
    items = "".join(f"<li>{escape(shorten(text, _LONGEST_REASON))}</li>" for text in told[:SHOWN_WARNINGS])
    more = f'<p class="note">And {len(told) - SHOWN_WARNINGS:,} more.</p>' if len(told) > SHOWN_WARNINGS else ""
    return f'<section class="panel warned"><h2>Warnings</h2><ul>{items}</ul>{more}</section>'


def _by_dataset(charts: Sequence[Chart]) -> str:
    return f'<section class="by-dataset"><h2>By dataset</h2>{figures(charts)}</section>' if charts else ""


def _data(data: Data) -> str:
    rows = [
        (name, use, f"{available:,}", f"{used:,}", "-" if samples is None else f"{samples:,}")
        for name, use, used, available, samples in data.rows
    ]
    parts = [table(("Dataset", "For", "Rows", "Rows used", "Usable samples in them"), rows)]
    if data.events:
        parts.append(table(("Dataset", "What happened", "Samples"), [(*text, f"{n:,}") for *text, n in data.events]))
    else:
        parts.append('<p class="note">No sample was left out, cut or unusual.</p>')
    if data.left_out:
        lines = [
            (
                one["dataset"],
                f"{one['file']}:{one['line']}",
                str(one.get("id") or ""),
                shorten(str(one["reason"]), _LONGEST_REASON),
            )
            for one in data.left_out[:LISTED]
        ]
        listed = table(("Dataset", "Line", "Id", "Reason"), lines)
        parts.append(
            '<details class="reasons"><summary>Samples that were left out: '
            f"{len(lines):,} of {data.num_left_out:,}</summary>{listed}"
            f'<p class="note">All of them are in <code>{escape(data.file)}</code>.</p></details>'
        )
    return f'<section class="panel used"><h2>Data</h2>{"".join(parts)}</section>'


def _modules(setup: Setup) -> str:
    names = ["Part", "Trained parameters", "All parameters", "Share", "Highest learning rate"]
    modules = [one for one in setup.modules if one.total]
    rows = [
        [
            one.module,
            f"{one.trainable:,}",
            f"{one.total:,}",
            f"{one.trainable / one.total:.2%}",
            "-" if one.learning_rate is None else short(one.learning_rate),
        ]
        for one in modules
    ]
    trained, total = sum(one.trainable for one in modules), sum(one.total for one in modules)
    rows.append(["all", f"{trained:,}", f"{total:,}", f"{trained / total:.2%}" if total else "-", "-"])
    if setup.adapters:
        names.insert(2, "Of these, in adapters")
        sums = [setup.adapters.get(one.module, 0) for one in modules]
        for row, count in zip(rows, [*sums, sum(sums)], strict=True):
            row.insert(2, f"{count:,}")
    return f'<section class="panel"><h2>Trainable parameters</h2>{table(names, rows)}</section>'


def _setup(setup: Setup) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setup.versions.items())
    defaults = [(name, value, "default") for name, value in setup.settings.items() if name not in setup.given]
    rows = [*((name, value, "given") for name, value in setup.given.items()), *defaults]
    return (
        f'<section class="panel settings"><h2>How to repeat it</h2><pre class="scroll">{escape(setup.command)}</pre>'
        f'<p class="note">{escape(setup.devices)}. {escape(versions)}.</p>'
        f"<details><summary>All {len(rows):,} settings</summary>{table(('Setting', 'Value', 'By'), rows)}</details>"
        "</section>"
    )
