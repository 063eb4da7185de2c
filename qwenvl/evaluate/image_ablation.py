"""Image ablation: scores and losses with each sample's own images, with blank ones, and with another sample's.

:mod:`qwenvl.inference.other_images` chooses the other sample. The loss is the training loss (teacher forcing): cross
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
class ImageAblation:
    """Effect of images and videos on the answers to a group of questions.

    Args:
        name: Name of the group.
        metric: Metric of the answers.
        count: Number of samples compared.
        left_out: Number of samples without media, without another sample to take media from, or with an error.
        scores: Score of each view.
        losses: Loss per trained token of each view, in nats.
        score_falls: Score of ``shown`` minus the score of each other view.
        loss_rises: Loss of each other view minus the loss of ``shown``.
        medium: Word for the media in messages.
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
        """The conclusion in a sentence."""
        if self.count < 2:
            return "Too few samples with images to say whether the answers depend on them."
        fall, rise = self.score_falls["swapped"], self.loss_rises["swapped"]
        told = f"{self._scores_told(fall)} {self._losses_told(rise)}"
        if fall.low > 0:
            return f"The answers depend on the {self.medium}: {told}"
        if fall.high < 0:
            return f"The answers depend on the {self.medium}, for the worse: {told}"
        if rise.low > 0:
            return f"The answers do not improve with the {self.medium}, but the loss does: {told}"
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
        """Return the figures as a dict for JSON."""
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


def compare_views(
    name: str, metric: Metric, views: Mapping[View, Sequence[Prediction]], seed: int = 0
) -> ImageAblation:
    """Compare the answers and losses of a group of samples.

    Args:
        name: Name of the group.
        metric: Metric of the answers.
        views: Lines of each view; samples that are not in all views are left out.
        seed: Seed of the resampling.
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
        return ImageAblation(name, metric, 0, len(views["shown"]), {}, {}, {}, {})
    return ImageAblation(
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
    return kinds.pop() if len(kinds) == 1 else "images and videos"


def _usable(line: Prediction) -> bool:
    return line.error is None and bool(line.media) and line.loss is not None


def _per_token(sums: np.ndarray, count: int) -> float:
    """Return the mean loss of trained tokens; sums are (loss, weighted number of trained tokens)."""
    del count
    return float(sums[0] / sums[1]) if sums[1] else 0.0
