"""Line charts of values by training step, as SVG whose size does not grow with the number of values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from qwenvl.report.scales import linear_ticks, log_ticks, short, tick_label

Point = tuple[float, float]
"""Optimizer step, value; the value may be infinite or NaN."""

STYLES = 6
"""Classes ``s0`` to ``s5`` of the style sheet: each has a colour and a pattern of dashes."""

WIDTH, HEIGHT = 340, 205
_RIGHT, _TOP, _BOTTOM = 18, 12, 42
_BUCKETS = 120
_BANDS = 60
_MOST_DOTS = 30
_LARGEST = 1e300  # the sum of two numbers of an axis must be finite
_WIDE_RANGE = 10  # greatest over smallest value from which a logarithmic axis helps


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: Name in the legend.
        points: Points in the order of their steps.
    """

    name: str
    points: tuple[Point, ...]

    @property
    def finite(self) -> list[Point]:
        """The points that can be drawn."""
        return [point for point in self.points if _is_drawable(point)]


@dataclass(frozen=True)
class Chart:
    """Lines that share an axis.

    Args:
        title: Title of the chart.
        lines: Lines to draw; at most :data:`STYLES` look different.
        unit: Unit of the values.
        log: Use a logarithmic axis if all values are positive and their range is wide.
        percent: Values are shares, and shown as per cent.
    """

    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    log: bool = False
    percent: bool = False

    def shown(self, value: float) -> str:
        """Return a value as text."""
        return f"{short(100 * value)}%" if self.percent else short(value)


def _is_drawable(point: Point) -> bool:
    return abs(point[1]) < _LARGEST


def thin(points: Sequence[Point], buckets: int = _BUCKETS) -> list[Point]:
    """Return fewer points that draw the same line: the first, the last, and the extremes of equal stretches of steps.

    Args:
        points: Points in the order of their steps.
        buckets: Number of stretches; up to twice as many points are returned unchanged.

    Returns:
        Some of the points, at most ``2 * buckets + 2``; of a stretch without a finite value, its first point.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    first, width = points[0][0], (points[-1][0] - points[0][0]) / buckets or 1.0
    kept: list[Point] = []
    for _, group in groupby(points, key=lambda point: min(buckets - 1, int((point[0] - first) / width))):
        members = list(group)
        places = [place for place, point in enumerate(members) if _is_drawable(point)]
        places.sort(key=lambda place: members[place][1])
        kept += [members[place] for place in sorted({places[0], places[-1]})] if places else members[:1]
    kept = kept if kept[0] == points[0] else [points[0], *kept]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def draw(chart: Chart) -> str:
    """Return the drawing, with a legend if there are several lines and a sentence; or a sentence alone.

    Browsers show the values of the step under the pointer.
    """
    lines = [Line(line.name, tuple(thin(line.points))) for line in chart.lines if line.finite]
    if not lines:
        return '<p class="note">There are no finite values to draw.</p>'
    frame = _Frame.around(chart, lines)
    drawn = "".join(frame.line(line, place % STYLES) for place, line in enumerate(lines))
    said = _say(chart)
    return (
        f"{_legend([line.name for line in lines])}"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{chart.title}: {said}")}">{frame.axes()}{drawn}{frame.bands(lines)}</svg>'
        f'<p class="note">{escape(said)}</p>'
    )


@dataclass(frozen=True)
class _Frame:
    """Positions of steps and values in the drawing.

    Args:
        chart: Chart to draw.
        steps: First and last step.
        low: Lower end of the axis; the power of ten on a logarithmic one.
        high: Upper end of the axis, as ``low``.
        log: The axis is logarithmic.
    """

    chart: Chart
    steps: tuple[float, float]
    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, chart: Chart, lines: Sequence[Line]) -> _Frame:
        """Return a frame that holds all points."""
        steps = (0.0, max(1.0, *(step for line in lines for step, _ in line.points)))
        values = [value for line in lines for _, value in line.finite]
        low, high = min(values), max(values)
        log = chart.log and low > 0 and high >= _WIDE_RANGE * low
        if log:
            low, high = math.log10(low), math.log10(high)
        elif 0 <= low <= 0.7 * high:
            low = 0.0
        margin = 0.05 * (high - low) or abs(high) / 10 or (0.005 if chart.percent else 0.5)
        return cls(chart, steps, low if low == 0 and not log else low - margin, high + margin, log)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Values of the axis, and their labels."""
        found = log_ticks(self.low, self.high, 6) if self.log else linear_ticks(self.low, self.high, 5)
        percent = self.chart.percent
        return [(one, f"{tick_label(float(f'{100 * one:.9g}'))}%" if percent else tick_label(one)) for one in found]

    @property
    def left(self) -> float:
        """Left end of the drawing, right of the labels."""
        return 14 + 7.2 * max((len(label) for _, label in self.ticks), default=1)

    def x(self, step: float) -> float:
        return self.left + (WIDTH - self.left - _RIGHT) * (step - self.steps[0]) / (self.steps[1] - self.steps[0])

    def y(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (self.high - place) / (self.high - self.low)

    def axes(self) -> str:
        left, right, bottom = f"{self.left:.1f}", WIDTH - _RIGHT, HEIGHT - _BOTTOM
        parts = []
        for value, label in self.ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for step in linear_ticks(*self.steps, 5):
            if step == int(step):
                x = f"{self.x(step):.1f}"
                parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 5}"/>')
                parts.append(f'<text x="{x}" y="{bottom + 19}" text-anchor="middle">{tick_label(step)}</text>')
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (self.left + right) / 2
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">optimizer step</text>')
        return "".join(parts)

    def line(self, line: Line, style: int) -> str:
        """Return a line, broken where a value is not finite, with dots where there are few points."""
        parts = []
        for drawable, group in groupby(line.points, key=_is_drawable):
            places = [f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in group] if drawable else []
            if len(places) > 1:
                parts.append(f'<polyline class="line s{style}" points="{" ".join(places)}"/>')
            elif places:
                parts.append(self._dots(places, style))
        if 1 < len(line.finite) <= _MOST_DOTS:
            parts.append(self._dots([f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in line.finite], style))
        return "".join(parts)

    def _dots(self, places: Iterable[str], style: int) -> str:
        pairs = (place.split(",") for place in places)
        return "".join(f'<circle class="dot s{style}" cx="{x}" cy="{y}" r="3"/>' for x, y in pairs)

    def bands(self, lines: Sequence[Line]) -> str:
        """Return vertical bands whose tooltips give the values nearest to them."""
        steps = sorted({step for line in lines for step, _ in line.points})
        if len(steps) > _BANDS:
            steps = [steps[round(place * (len(steps) - 1) / (_BANDS - 1))] for place in range(_BANDS)]
        middles = [(one + other) / 2 for one, other in pairwise(steps)]
        borders = [self.left, *map(self.x, middles), float(WIDTH - _RIGHT)]
        parts = []
        for step, start, end in zip(steps, borders, borders[1:], strict=False):
            place = f'x="{start:.1f}" y="{_TOP}" width="{end - start:.1f}" height="{HEIGHT - _TOP - _BOTTOM}"'
            parts.append(f'<rect class="band" {place}><title>{escape(self._values(lines, step))}</title></rect>')
        return "".join(parts)

    def _values(self, lines: Sequence[Line], step: float) -> str:
        said = [f"step {step:,g}"]
        for line in lines:
            nearest = min(line.points, key=lambda point: abs(point[0] - step))
            at = "" if nearest[0] == step else f" (step {nearest[0]:,g})"
            said.append(f"{line.name}: {self.chart.shown(nearest[1])}{at}")
        return "\n".join(said)


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    marks = "".join(
        f'<li><svg class="mark" viewBox="0 0 28 8" aria-hidden="true"><line class="line s{place % STYLES}" x1="0" '
        f'x2="28" y1="4" y2="4"/></svg>{escape(name)}</li>'
        for place, name in enumerate(names)
    )
    return f'<ul class="legend">{marks}</ul>'


def _say(chart: Chart) -> str:
    """Return the last value and the range of each line in words."""
    said = []
    for line in chart.lines:
        name = f"{line.name}: " if len(chart.lines) > 1 else ""
        values = [value for _, value in line.finite]
        lost = len(line.points) - len(values)
        if values:
            last, low, high = (chart.shown(value) for value in (values[-1], min(values), max(values)))
            ranging = f"last {last} ({low} to {high})" if low != high else f"{last} throughout"
            said.append(name + (ranging if len(values) > 1 else f"{last} at step {line.finite[0][0]:,g}"))
        if lost:
            said.append(f"{name}{lost:,} value{'s' * (lost != 1)} not finite")
    return "; ".join(said)
