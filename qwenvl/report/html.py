"""The style sheet, frame and tables of every page."""

from __future__ import annotations

import string
from collections.abc import Sequence
from html import escape
from pathlib import Path

from qwenvl.report.chart import Chart, draw


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


def shorten(text: str, longest: int) -> str:
    """Return at most that many characters of a text, with a sign where it was cut."""
    text = text.strip()
    return text if len(text) <= longest else f"{text[:longest]} ..."


def figures(charts: Sequence[Chart]) -> str:
    """Return charts beside and below each other; a sentence if there is none."""
    if not charts:
        return '<p class="note">Nothing has been logged yet (--logging_steps).</p>'
    drawn = (
        f'<figure class="panel"><figcaption>{escape(chart.title)} <span class="note">{escape(chart.unit)}</span>'
        f"</figcaption>{draw(chart)}</figure>"
        for chart in charts
    )
    return f'<div class="figures">{"".join(drawn)}</div>'


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of plain text, which scrolls sideways on narrow pages.

    Args:
        names: Names of the columns.
        rows: Rows, each with one text per column.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
