"""The loss of a training run as an SVG drawing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

Point = tuple[float, float]
"""Optimizer step, loss."""

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 34, 50


@dataclass(frozen=True)
class Losses:
    """Loss per trained token (nats) against optimizer steps.

    Args:
        train: during training, each the mean of the steps since the last one.
        held_out: on held-out samples.
        seconds: wall time of training; None where it is not known.
    """

    train: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()
    seconds: float | None = None


def read_losses(model: Path) -> Losses:
    """Read what the Trainer has logged in ``trainer_state.json``; nothing where a folder has none."""
    file = model / "trainer_state.json"
    if not file.is_file():
        return Losses()
    history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    seconds = [float(entry["train_runtime"]) for entry in history if "train_runtime" in entry]
    return Losses(_series(history, "loss"), _series(history, "eval_loss"), seconds[-1] if seconds else None)


def _series(history: Sequence[dict[str, float]], key: str) -> tuple[Point, ...]:
    return tuple((entry["step"], float(entry[key])) for entry in history if key in entry)


def draw(losses: Losses) -> str:
    """Return an SVG element; colours come from the page's classes ``train`` and ``heldout``."""
    points = [point for point in (*losses.train, *losses.held_out) if point[1] > 0]
    if not points:
        return '<p class="note">The folder holds no record of its training, so there is no loss to show.</p>'
    last_step = max(step for step, _ in points)
    low = math.log10(min(loss for _, loss in points))
    high = math.log10(max(loss for _, loss in points))
    frame = _Frame(last_step, low - 0.05, max(high, low + 0.1) + 0.05)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_describe(losses))}">'
        f"{frame.axes()}{frame.line(losses.train, 'train')}{frame.line(losses.held_out, 'heldout')}"
        f"{frame.dots(losses.held_out)}{_legend()}</svg>"
    )


@dataclass(frozen=True)
class _Frame:
    """Where a step and a loss stand in the drawing; the loss axis is logarithmic."""

    last_step: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last_step

    def y(self, loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - math.log10(loss)) / (self.high - self.low)

    def axes(self) -> str:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for loss in _loss_ticks(self.low, self.high):
            y = self.y(loss)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
        for step in _step_ticks(self.last_step):
            x = self.x(step)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{step:g}</text>')
        middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
        turned = f'transform="rotate(-90 16 {middle_y})"'
        parts.append(f'<text x="16" y="{middle_y}" text-anchor="middle" {turned}>loss per trained token (nats)</text>')
        return "".join(parts)

    def line(self, points: Sequence[Point], name: str) -> str:
        places = " ".join(f"{self.x(step):.1f},{self.y(loss):.1f}" for step, loss in points if loss > 0)
        return f'<polyline class="line {name}" points="{places}"/>'

    def dots(self, points: Sequence[Point]) -> str:
        return "".join(
            f'<circle class="dot" cx="{self.x(step):.1f}" cy="{self.y(loss):.1f}" r="4">'
            f"<title>step {step:g}: {loss:.3f}</title></circle>"
            for step, loss in points
            if loss > 0
        )


def _legend() -> str:
    y = 16
    return (
        f'<line class="line train" x1="{LEFT}" x2="{LEFT + 28}" y1="{y}" y2="{y}"/>'
        f'<text x="{LEFT + 34}" y="{y + 4}">training</text>'
        f'<line class="line heldout" x1="{LEFT + 120}" x2="{LEFT + 148}" y1="{y}" y2="{y}"/>'
        f'<circle class="dot" cx="{LEFT + 134}" cy="{y}" r="4"/>'
        f'<text x="{LEFT + 154}" y="{y + 4}">held-out samples</text>'
    )


def _loss_ticks(low: float, high: float) -> list[float]:
    """Return round losses between two powers of ten: 1, 2, 5 of each decade, or decades alone where they are many."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    exponents = range(math.floor(low) - 1, math.ceil(high) + 1)
    candidates = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [loss for loss in candidates if low <= math.log10(loss) <= high]


def _step_ticks(last_step: float) -> list[float]:
    """Return about five round steps from 0."""
    rough = max(1.0, last_step / 5)
    magnitude = 10 ** math.floor(math.log10(rough))
    size = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    return [size * index for index in range(int(last_step // size) + 1)]


def _describe(losses: Losses) -> str:
    parts = []
    for name, points in (("Training", losses.train), ("Held-out", losses.held_out)):
        if points:
            parts.append(f"{name} loss from {points[0][1]:.3f} to {points[-1][1]:.3f} at step {points[-1][0]:g}.")
    return " ".join(parts)
