"""Draw a confusion matrix as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

CELL = 44
MOST_NUMBERS = 25
"""Maximum number of classes for which counts are written into the cells."""

_LETTER = 7.2
_LONGEST = 24


def confusion_svg(counts: np.ndarray, classes: Sequence[str], title: str = "Confusion matrix") -> str:
    """Return a confusion matrix as SVG.

    Rows are expected classes, columns predicted ones; a cell's shade is its share of the row.

    Args:
        counts: int [classes, classes].
        classes: Names of the classes.
        title: Title above the matrix.
    """
    size = CELL if len(classes) <= MOST_NUMBERS else max(6, CELL * MOST_NUMBERS // len(classes))
    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in classes]
    margin = int(_LETTER * max(map(len, names))) + 34
    side = size * len(classes)
    width, height = margin + side + 12, margin + side + 44
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    turned = f'x="14" y="{32 + side / 2}" text-anchor="middle" transform="rotate(-90 14 {32 + side / 2})"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{margin}" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="{margin + side / 2}" y="{height - 8}" text-anchor="middle">predicted</text>',
        f"<text {turned}>expected</text>",
    ]
    for row, name in enumerate(names):
        middle = 32 + size * row + size / 2 + 4
        parts.append(f'<text x="{margin - 6}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        across = margin + size * row + size / 2 + 4
        below = 32 + side + 8
        parts.append(
            f'<text x="{across}" y="{below}" text-anchor="end" transform="rotate(-90 {across} {below})">'
            f"{escape(name)}</text>"
        )
        for column in range(len(names)):
            parts += _cell(margin + size * column, 32 + size * row, size, int(counts[row, column]), shares[row, column])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(left: int, top: int, size: int, count: int, share: float) -> list[str]:
    shade = [round(255 - share * (255 - full)) for full in (31, 90, 160)]
    colour = f"rgb({shade[0]},{shade[1]},{shade[2]})"
    found = [f'<rect x="{left}" y="{top}" width="{size}" height="{size}" stroke="#ddd" fill="{colour}"/>']
    if count and size == CELL:
        ink = "#fff" if share > 0.5 else "#222"
        middle = f'x="{left + size / 2}" y="{top + size / 2 + 4}"'
        found.append(f'<text {middle} text-anchor="middle" fill="{ink}">{count}</text>')
    return found
