"""Score predictions by dataset, each with its metric and a confidence interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwenvl.evaluate.image_ablation import ImageAblation, compare_views
from qwenvl.inference.other_images import View
from qwenvl.metrics.base import Metric, Scored
from qwenvl.metrics.bootstrap import Interval, score_interval
from qwenvl.metrics.predictions import Prediction
from qwenvl.metrics.registry import choose_metric, find_metric, score_lines, to_case


@dataclass(frozen=True)
class Scores:
    """Scores of the samples of a dataset that have the same metric.

    Args:
        dataset: Name of the dataset.
        metric: Metric of the samples.
        lines: Samples with an answer.
        scored: Score of each of ``lines``.
        not_asked: Samples that could not be asked, with their errors.
    """

    dataset: str
    metric: Metric
    lines: tuple[Prediction, ...]
    scored: tuple[Scored, ...]
    not_asked: tuple[Prediction, ...] = ()

    @property
    def unreadable(self) -> int:
        """Number of answers that the metric cannot read; they count as wrong."""
        return sum(not one.readable for one in self.scored)

    @property
    def cut(self) -> int | None:
        """Number of answers that ``--max_new_tokens`` cut, scored as they are; None without any ``finish_reason``."""
        reasons = [line.finish_reason for line in self.lines if line.finish_reason is not None]
        return sum(reason == "length" for reason in reasons) if reasons else None

    def interval(self, seed: int = 0) -> Interval | None:
        """Return the score with its interval; None without any answer."""
        if not self.scored:
            return None
        return score_interval(np.array([self.metric.statistics(one) for one in self.scored]), self.metric.total, seed)

    def worst(self, count: int) -> list[tuple[Prediction, Scored]]:
        """Return the lines with the lowest scores below 1; ties: unreadable answers first, then in data order."""
        pairs = [pair for pair in zip(self.lines, self.scored, strict=True) if pair[1].value < 1]
        return sorted(pairs, key=lambda pair: (pair[1].value, pair[1].readable))[:count]

    def as_dict(self, seed: int = 0) -> dict[str, Any]:
        """Return the figures as a dict for JSON."""
        interval = self.interval(seed)
        return {
            "dataset": self.dataset,
            "metric": self.metric.name,
            "count": len(self.lines),
            "score": interval.as_dict() if interval is not None else None,
            "unreadable": self.unreadable,
            "cut": self.cut,
            "not_asked": len(self.not_asked),
        }


def evaluate(lines: Sequence[Prediction], metric: str | None = None) -> list[Scores]:
    """Score lines by dataset, and within a dataset by the metric of each sample.

    Args:
        lines: Predictions of any datasets.
        metric: Name of one metric for all lines; None for the metric that a sample or its dataset names, or that fits
            the expected answers.

    Raises:
        UserError: there is no such metric.
    """
    groups: dict[tuple[str, str | None], list[Prediction]] = {}
    for line in lines:
        if line.error is None:
            groups.setdefault((line.dataset, metric or line.metric), []).append(line)
    found = [_scores(dataset, name, group) for (dataset, name), group in groups.items()]
    for dataset in dict.fromkeys(line.dataset for line in lines if line.error is not None):
        bad = tuple(line for line in lines if line.error is not None and line.dataset == dataset)
        place = next((place for place, one in enumerate(found) if one.dataset == dataset), None)
        if place is None:
            found.append(Scores(dataset, find_metric(metric or "exact_match"), (), (), bad))
        else:
            one = found[place]
            found[place] = Scores(dataset, one.metric, one.lines, one.scored, bad)
    return found


def _scores(dataset: str, name: str | None, lines: Sequence[Prediction]) -> Scores:
    metric = find_metric(name) if name is not None else choose_metric([to_case(line) for line in lines])
    return Scores(dataset, metric, tuple(lines), tuple(score_lines(lines, metric)))


def evaluate_views(scores: Sequence[Scores], views: Mapping[View, Sequence[Prediction]]) -> list[ImageAblation]:
    """Compare the views of each group of samples.

    Args:
        scores: Scores of the lines of ``shown``.
        views: Lines of each view.
    """
    return [
        compare_views(
            one.dataset,
            one.metric,
            {**{view: _of(lines, one) for view, lines in views.items()}, "shown": [*one.lines, *one.not_asked]},
        )
        for one in scores
    ]


def _of(lines: Sequence[Prediction], scores: Scores) -> list[Prediction]:
    keys = {(line.index, line.member) for line in scores.lines}
    return [line for line in lines if (line.index, line.member) in keys]
