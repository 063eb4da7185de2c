"""Histograms, shares and packs as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from qwenvl.report.scales import round_up, short

COLOURS = 8
"""Classes ``c0`` to ``c7`` of the style sheet; further datasets reuse them from ``c0``."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 320, 150, 8, 22, 8
_BINS = 24
_WIDEST = 36  # drawing units; keeps the bar of a single value narrow


def histogram(title: str, values: Sequence[float] | np.ndarray, unit: str) -> str:
    """Return a histogram with the median, 95th percentile and maximum; an empty text if there are no values.

    Args:
        title: Title of the figure.
        values: Values to count.
        unit: Unit of the values.
    """
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return ""
    edges = _edges(numbers)
    counts, _ = np.histogram(numbers, edges)
    scale = (_HEIGHT - _TOP - _BOTTOM) / counts.max()
    width = (_WIDTH - 2 * _LEFT) / len(counts)
    bars = "".join(
        f'<rect class="bar" x="{_LEFT + place * width:.1f}" y="{_HEIGHT - _BOTTOM - count * scale:.1f}" '
        f'width="{min(max(width - 1, 1), _WIDEST):.1f}" height="{count * scale:.1f}">'
        f"<title>{_bin_name(edges, place)} {escape(unit)}: {count:,}</title></rect>"
        for place, count in enumerate(counts.tolist())
        if count
    )
    base = _HEIGHT - _BOTTOM
    axis = f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{base}" y2="{base}"/>'
    last = short(edges[-2] if _is_one_number(edges, len(edges) - 2) else edges[-1])
    ends = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 5}">{short(edges[0])}</text>'
        f'<text x="{_WIDTH - _LEFT}" y="{_HEIGHT - 5}" text-anchor="end">{last}</text>'
    )
    middle, high, most = np.median(numbers), np.percentile(numbers, 95), numbers.max()
    says = f"median {short(middle)}, 95% up to {short(high)}, maximum {short(most)} {unit}"
    return (
        f'<figure class="panel"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}: {says}")}">{axis}{bars}{ends}'
        f'</svg><p class="note">{escape(says)}</p></figure>'
    )


def _edges(numbers: np.ndarray) -> np.ndarray:
    """Return round bin edges; whole numbers of a small range have a bin each."""
    low, high = float(numbers.min()), float(numbers.max())
    whole = bool(np.all(numbers == np.round(numbers)))
    if whole and high - low < _BINS:
        return np.arange(low, high + 2)
    step = round_up((high - low) / _BINS) if high > low else max(abs(high) / 10, 1e-3)
    first = math.floor(low / step) * step
    return first + step * np.arange(math.floor((high - first) / step) + 2)


def _bin_name(edges: np.ndarray, place: int) -> str:
    if _is_one_number(edges, place):
        return short(edges[place])
    return f"{short(edges[place])} to {short(edges[place + 1])}"


def _is_one_number(edges: np.ndarray, place: int) -> bool:
    return bool(edges[place + 1] - edges[place] == 1 and edges[place] == round(edges[place]))


def shares(title: str, names: Sequence[str], values: Sequence[float]) -> str:
    """Return one bar divided into the shares of the datasets."""
    total = sum(values)
    if not total:
        return ""
    parts, x = "", 0.0
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        width = 1000 * value / total
        parts += (
            f'<rect class="c{place % COLOURS}" x="{x:.2f}" y="0" width="{width:.2f}" height="30">'
            f"<title>{escape(name)}: {value / total:.1%} of {escape(title)}</title></rect>"
        )
        x += width
    label = escape(", ".join(f"{name} {value / total:.1%}" for name, value in zip(names, values, strict=True)))
    return (
        f'<p class="bar-title">{escape(title)}</p><svg class="share" viewBox="0 0 1000 30" preserveAspectRatio="none" '
        f'role="img" aria-label="{label}">{parts}</svg>'
    )


def pack_bars(packs: Sequence[Sequence[tuple[int, int]]], capacity: int, names: Sequence[str]) -> str:
    """Return packs as bars of their samples; the free space to the right is padding.

    Args:
        packs: Packs, each the (dataset, tokens) of its samples.
        capacity: Most tokens of a pack.
        names: Names of the datasets.
    """
    height, rows = 14, ""
    for number, members in enumerate(packs):
        x, y = 0.0, number * (height + 4)
        rows += f'<rect class="room" x="0" y="{y}" width="1000" height="{height}"/>'
        for dataset, tokens in members:
            width = 1000 * tokens / capacity
            rows += (
                f'<rect class="c{dataset % COLOURS} member" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}">'
                f"<title>pack {number}: {escape(names[dataset])}, {tokens:,} tokens</title></rect>"
            )
            x += width
    total = len(packs) * (height + 4)
    return (
        f'<svg class="packs" viewBox="0 0 1000 {total}" preserveAspectRatio="none" role="img" '
        f'style="height:{total}px" aria-label="{len(packs)} packs, each a bar of its samples">{rows}</svg>'
    )


def legend(names: Sequence[str]) -> str:
    """Return the legend of the datasets' colours."""
    marks = "".join(
        f'<li><span class="swatch c{place % COLOURS}"></span>{escape(name)}</li>' for place, name in enumerate(names)
    )
    return f'<ul class="legend">{marks}</ul>'
