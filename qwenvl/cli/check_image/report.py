"""The results of a check: counts, output files and the table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qwenvl.cli.check_image.tables import CheckedRows, Problem
from qwenvl.cli.write_rows import dump, write_rows
from qwenvl.data.sources.table import AnnotationTable

HEADINGS = ("dataset", "problem", "samples", "first at", "reason")
USABLE = "no problem"


@dataclass
class Summary:
    """Results of the check of a dataset.

    Args:
        table: Annotations of the dataset.
        counts: Number of samples (and unreadable rows) with a problem, by category.
        examples: First problem of each category.
        samples: int64 arrays, the number of samples of each row.
        digests: Content hashes of all samples.
        media: Number of images and videos.
        bad: (row, member) of every sample with a problem.
        unread_keys: Unused keys of the samples, as named in messages.
        remarks: Number of samples by kind of :data:`qwenvl.data.sample_stats.REMARKS`.
    """

    table: AnnotationTable
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Problem] = field(default_factory=dict)
    samples: list[np.ndarray] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    media: int = 0
    bad: set[tuple[int, int]] = field(default_factory=set)
    unread_keys: set[str] = field(default_factory=set)
    remarks: Counter[str] = field(default_factory=Counter)
    _seen: tuple[int, int, frozenset[str]] = (-1, -1, frozenset())

    def add(self, checked: CheckedRows) -> None:
        """Add the results of some rows."""
        self.samples.append(checked.samples)
        self.digests.append(checked.digests)
        self.media += int(checked.media.sum())
        self.unread_keys |= checked.unread_keys
        self.remarks.update(checked.remarks)

    def note(self, problem: Problem) -> None:
        """Count a problem; the problems of one sample must come in succession."""
        row, member, seen = self._seen
        seen = seen if (row, member) == problem[:2] else frozenset()
        if problem.category not in seen:
            self.counts[problem.category] = self.counts.get(problem.category, 0) + 1
            self.examples.setdefault(problem.category, problem)
        self._seen = (problem.row, problem.member, seen | {problem.category})
        self.bad.add((problem.row, problem.member))

    @property
    def total(self) -> int:
        """Number of samples and unreadable rows."""
        return sum(int(samples.sum()) + int((samples == 0).sum()) for samples in self.samples)


def write_problem(file: IO[str], problem: Problem) -> None:
    """Write a line of ``*_problems.jsonl``."""
    file.write(dump(problem.origin.record(problem.category, problem.reason)) + "\n")


def write_clean(summary: Summary, path: Path) -> int:
    """Write the usable samples of a dataset as JSON lines; return the number of rows. See :func:`write_rows`."""
    out: dict[int, set[int]] = {}
    for row, member in summary.bad:
        out.setdefault(row, set()).add(member)
    return write_rows(summary.table, out, path)


def show(summaries: list[Summary], notes: list[str], console: Console | None = None) -> None:
    """Print the table: a line for every category of every dataset, with the first sample that has it.

    Lines are cut to the width of a terminal, but not in files and pipes.
    """
    console = console or Console(highlight=False)
    rows = [row for summary in summaries for row in _rows(summary)]
    widths = [max(map(cell_len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    console.print(_line(HEADINGS, widths, ("bold",) * len(HEADINGS)), no_wrap=True, overflow="ellipsis")
    previous = ""
    for row in rows:
        if row[0] != previous and console.is_terminal:
            console.print()
        name = row[0] if row[0] != previous or not console.is_terminal else ""
        styles = ("", "red", "", "cyan", "") if row[1] != USABLE else ("", "bold green", "bold green", "", "")
        line = _line((name, *row[1:]), widths, styles)
        console.print(line, no_wrap=True, overflow="ellipsis" if console.is_terminal else "ignore", crop=False)
        previous = row[0]
    console.print()
    for note in notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


def _line(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str]) -> Text:
    line = Text()
    for cell, width, style, heading in zip(cells, widths, styles, HEADINGS, strict=True):
        padding = " " * (width - cell_len(cell))
        line.append(padding + cell if heading == "samples" else cell + padding, style).append("  ")
    line.rstrip()
    return line


def _rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each line, under :data:`HEADINGS`."""
    name, folder = summary.table.spec.name, summary.table.spec.data_path
    for category, count in sorted(summary.counts.items(), key=lambda item: -item[1]):
        problem = summary.examples[category]
        reason = problem.reason.replace("\n", " ")
        reason = reason.replace(os.path.join(folder, ""), "") if folder else reason
        yield name, category, f"{count:,}", f"{Path(problem.origin.file).name}:{problem.origin.line}", reason
    total = summary.total
    yield name, USABLE, f"{total - len(summary.bad):,}", f"of {total:,}", ""
