"""Format tables: drawn on a terminal, plain aligned text in files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import IO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_GAP = 2
"""Columns between two columns of a table."""


def table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str | Text]], *, words: Collection[int] = (0,)
) -> Table:
    """Return a table under headings.

    Args:
        title: Title above the table.
        headings: One heading per column.
        rows: Cells as plain text: square brackets are not markup.
        words: Indices of the columns with words; the others hold numbers, which are right-aligned and never broken.
    """
    drawn = _empty(title, headings=True)
    for number, heading in enumerate(headings):
        if number in words:
            drawn.add_column(heading, overflow="fold")
        else:
            drawn.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(_cell, row))
    return drawn


def pairs(title: str, values: Mapping[str, str]) -> Table:
    """Return a table of names and their values; names without a value are left out."""
    drawn = _empty(title, headings=False)
    drawn.add_column(no_wrap=True, style="cyan")
    drawn.add_column(overflow="fold")
    for name, value in values.items():
        if value:
            drawn.add_row(Text(name), Text(value))
    return drawn


def as_text(*parts: RenderableType, stream: IO[str] | None = None) -> str:
    """Return tables and lines as text for a stream, with an empty line between them.

    On a terminal, the text has its width, colours and lines; elsewhere it is plain: no colours, no lines around cells,
    no cell broken over lines.

    Args:
        parts: Tables, lines or other objects that rich draws. The frame of a table is set here.
        stream: Stream that the text will be written to; standard error where None.
    """
    console = Console(file=stream or sys.stderr, highlight=False, force_jupyter=False)
    if not console.is_terminal:
        console.width = 10_000  # a table is no wider than its cells
    for part in parts:
        if isinstance(part, Table):
            _draw_for(part, console)
    drawn = [_trimmed(console, part) for part in parts]
    return "\n\n".join(text for text in drawn if text)


def _empty(title: str, *, headings: bool) -> Table:
    name = Text(title, "bold") if title else None
    return Table(title=name, title_justify="left", show_header=headings, header_style="cyan")


def _cell(content: str | Text) -> Text:
    return content if isinstance(content, Text) else Text(content)


def _draw_for(drawn: Table, console: Console) -> None:
    """Give a table the frame for a terminal or for plain text."""
    if console.is_terminal and drawn.show_header:
        drawn.box, drawn.show_edge, drawn.pad_edge, drawn.padding = box.SIMPLE_HEAD, False, False, (0, 1)
    else:
        drawn.box, drawn.pad_edge, drawn.padding = None, False, (0, _GAP, 0, 0)


def _trimmed(console: Console, part: RenderableType) -> str:
    with console.capture() as captured:
        console.print(part, markup=False, soft_wrap=not isinstance(part, Table))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
