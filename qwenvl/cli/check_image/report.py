"""The results of a check: counts, output files and the table."""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qwenvl.cli.check_image.tables import CheckedRows, Problem
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
    file.write(_dump(problem.origin.record(problem.category, problem.reason)) + "\n")


def write_clean(summary: Summary, path: Path) -> int:
    """Write the usable samples of a dataset as JSON lines; return the number of rows.

    JSON lines are copied byte for byte. Other rows are serialized again with all of their fields: items of an indented
    array, rows of Parquet files, packed rows without their bad members. Bytes, which JSON cannot hold, become data
    URIs.
    """
    rows = 0
    with path.open("wb") as file:
        for row, samples in enumerate(np.concatenate(summary.samples).tolist()):
            bad = [member for member in range(samples) if (row, member) in summary.bad]
            if len(bad) == samples:
                continue
            text = summary.table.text(row) if not bad else None
            if text is None or b"\n" in text or b"\r" in text:
                text = _rewritten(summary.table, row, bad)
            file.write(text + b"\n")
            rows += 1
    return rows


def _rewritten(table: AnnotationTable, row: int, bad: list[int]) -> bytes:
    samples = table[row]
    records = [_as_json(sample.record) for member, sample in enumerate(samples) if member not in bad]
    packed = samples[0].origin.member is not None
    return _dump(records if packed else records[0]).encode()


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # Half of a surrogate pair cannot be written as UTF-8; escaped, it can.
    return text if text.isascii() or not any("\ud800" <= one <= "\udfff" for one in text) else json.dumps(value)


def _as_json(value: Any) -> Any:
    """Return a value in a form that JSON can hold: embedded media as data URIs, other objects as text."""
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            rest = {key: item for key, item in value.items() if key not in ("bytes", "path")}
            return _as_json(rest) | {"url": _data_uri(value["bytes"])}
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, bytes):
        return _data_uri(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _data_uri(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


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
