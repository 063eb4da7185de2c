"""Does the model look? Scores and losses with the samples' own images, with blank ones, and with those of others.

Which images the others are: :mod:`qwenvl.inference.other_images`. The loss is that of training, teacher forced: cross
entropy per trained token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwenvl.inference.other_images import VIEWS, View, key_of
from qwenvl.metrics.base import Metric
from qwenvl.metrics.bootstrap import Interval, difference_interval, score_interval
from qwenvl.metrics.predictions import Prediction
from qwenvl.metrics.registry import score_lines


@dataclass(frozen=True)
class Blindness:
    """How much the answers to a group of questions depend on what they show.

    Args:
        name: of the group.
        metric: what answers are measured by.
        count: samples compared.
        left_out: samples without media, or without another one to take media from, or that could not be asked.
        scores: of each view.
        losses: per trained token, in nats, of each view.
        score_falls: score of ``shown`` minus that of each other view.
        loss_rises: loss of each other view minus that of ``shown``.
        medium: what the samples show, in words.
    """

    name: str
    metric: Metric
    count: int
    left_out: int
    scores: Mapping[View, Interval]
    losses: Mapping[View, Interval]
    score_falls: Mapping[View, Interval]
    loss_rises: Mapping[View, Interval]
    medium: str = "image"

    @property
    def verdict(self) -> str:
        """What it says, in words."""
        if self.count < 2:
            return "Too few samples with pictures to say whether the answers depend on them."
        fall, rise = self.score_falls["swapped"], self.loss_rises["swapped"]
        told = f"{self._scores_told(fall)} {self._losses_told(rise)}"
        if fall.low > 0:
            return f"The answers depend on the {self.medium}: {told}"
        if fall.high < 0:
            return f"The answers depend on the {self.medium}, for the worse: {told}"
        if rise.low > 0:
            return f"The answers are no better for the {self.medium}, but the loss shows that the model sees it: {told}"
        return f"No evidence that the answers depend on the {self.medium}: {told}"

    def _scores_told(self, fall: Interval) -> str:
        shown, swapped, empty = (self.scores[view].value for view in ("shown", "swapped", "blank"))
        return (
            f"{self.metric.title} is {shown:.1%} with its own {self.medium}, {swapped:.1%} with that of another sample "
            f"(difference {100 * fall.value:.1f} points, 95% CI {100 * fall.low:.1f} to {100 * fall.high:.1f}) and "
            f"{empty:.1%} with a blank one."
        )

    def _losses_told(self, rise: Interval) -> str:
        shown, swapped, empty = (self.losses[view].value for view in ("shown", "swapped", "blank"))
        return (
            f"The loss per trained token is {shown:.3f}, {swapped:.3f} (difference {rise.value:.3f}, 95% CI "
            f"{rise.low:.3f} to {rise.high:.3f}) and {empty:.3f}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        parts = ("scores", "losses", "score_falls", "loss_rises")
        found = {part: {view: one.as_dict() for view, one in getattr(self, part).items()} for part in parts}
        return {
            "name": self.name,
            "metric": self.metric.name,
            "count": self.count,
            "left_out": self.left_out,
            "verdict": self.verdict,
            **found,
        }


def compare_views(name: str, metric: Metric, views: Mapping[View, Sequence[Prediction]], seed: int = 0) -> Blindness:
    """Compare the answers and losses of a group of samples.

    Args:
        name: of the group.
        metric: what answers are measured by.
        views: the lines of each view; samples that are not in all of them are left out.
        seed: of the resampling.
    """
    by_key = {view: {key_of(line): line for line in lines if _usable(line)} for view, lines in views.items()}
    keys = [key for key in by_key["shown"] if all(key in lines for lines in by_key.values())]
    statistics, losses = {}, {}
    for view, lines in by_key.items():
        scored = score_lines([lines[key] for key in keys], metric)
        statistics[view] = np.array([metric.statistics(one) for one in scored])
        losses[view] = np.array([(lines[key].loss, lines[key].trained_tokens) for key in keys], dtype=np.float64)
    others: tuple[View, ...] = ("blank", "swapped")
    if not keys:
        return Blindness(name, metric, 0, len(views["shown"]), {}, {}, {}, {})
    return Blindness(
        name,
        metric,
        len(keys),
        len(views["shown"]) - len(keys),
        {view: score_interval(statistics[view], metric.total, seed) for view in VIEWS},
        {view: score_interval(losses[view], _per_token, seed) for view in VIEWS},
        {view: difference_interval(statistics["shown"], statistics[view], metric.total, seed) for view in others},
        {view: difference_interval(losses[view], losses["shown"], _per_token, seed) for view in others},
        _medium(views["shown"]),
    )


def _medium(lines: Sequence[Prediction]) -> str:
    kinds = {kind for line in lines for kind, _ in line.media}
    return kinds.pop() if len(kinds) == 1 else "pictures and videos"


def _usable(line: Prediction) -> bool:
    return line.error is None and bool(line.media) and line.loss is not None


def _per_token(sums: np.ndarray, count: int) -> float:
    """Return the mean loss of trained tokens; sums are (loss, trained tokens by their weights)."""
    del count
    return float(sums[0] / sums[1]) if sums[1] else 0.0
