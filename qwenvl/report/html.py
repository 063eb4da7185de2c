"""The style sheet, frame and tables of every page."""

from __future__ import annotations

import string
from collections.abc import Sequence
from html import escape
from pathlib import Path


def style() -> str:
    """Return the style sheet of all pages, light and dark."""
    return (Path(__file__).parent / "style.css").read_text(encoding="utf-8")


def build_page(title: str, *parts: str) -> str:
    """Return an HTML page that needs no other file.

    Args:
        title: Title, plain text.
        parts: HTML below the title, in order; empty parts are left out.
    """
    template = string.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), style=style(), body="\n".join(part for part in parts if part))


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text, which scrolls sideways on narrow pages.

    Args:
        names: Names of the columns.
        rows: Rows, each with one text per column.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
