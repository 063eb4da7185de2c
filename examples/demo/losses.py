"""The losses of a training run, read from its output folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qwenvl.report.chart import Chart, Line, Point
from qwenvl.report.curves import series


@dataclass(frozen=True)
class Losses:
    """Loss per trained token (nats) against optimizer steps.

    Args:
        train: Training losses, each the mean of the steps since the previous one.
        held_out: Losses on held-out samples.
        seconds: Wall time of training; None if unknown.
    """

    train: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()
    seconds: float | None = None

    @property
    def chart(self) -> Chart:
        """Both losses in one drawing."""
        named = (("training", self.train), ("held-out samples", self.held_out))
        return Chart("Loss", tuple(Line(name, points) for name, points in named if points), log=True)


def read_losses(model: Path) -> Losses:
    """Read the losses from ``trainer_state.json``; return empty ones if the folder has no such file."""
    file = model / "trainer_state.json"
    if not file.is_file():
        return Losses()
    history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    seconds = [float(entry["train_runtime"]) for entry in history if "train_runtime" in entry]
    return Losses(series(history, "loss"), series(history, "eval_loss"), seconds[-1] if seconds else None)
