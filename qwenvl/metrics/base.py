"""Types of metrics: cases, scores, and the metric itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Total = Callable[[np.ndarray, int], float]
"""Function of (statistics summed over samples: float64 [k]; number of samples) that returns their overall score."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answered question.

    Args:
        question: Text of the question.
        expected: Correct answers; one or more.
        prediction: Answer of the model.
    """

    question: str
    expected: tuple[str, ...]
    prediction: str


@dataclass(frozen=True, slots=True)
class Scored:
    """Score of one answer.

    Args:
        value: Score, 0 to 1.
        readable: Whether the answer has the form that the metric reads; an unreadable answer counts as wrong.
        statistics: Values to sum over samples, for a metric whose overall score is not the mean of ``value``.
    """

    value: float
    readable: bool = True
    statistics: tuple[float, ...] = ()


def mean(sums: np.ndarray, count: int) -> float:
    """Return the mean of the first statistic."""
    return float(sums[0]) / count if count else 0.0


@dataclass(frozen=True)
class Metric:
    """A metric of answers.

    Args:
        name: Name for the ``--metric`` flag.
        title: Name for tables.
        source: Definition or paper.
        score: Function that scores one answer.
        total: Function that computes the overall score; by default the mean of the values.
    """

    name: str
    title: str
    source: str
    score: Callable[[Case], Scored]
    total: Total = mean

    def statistics(self, scored: Scored) -> tuple[float, ...]:
        """Return the values of one answer that are summed over samples for :attr:`total`."""
        return scored.statistics or (scored.value,)


def best(case: Case, compare: Callable[[str, str], float]) -> Scored:
    """Return the best score against any of the expected answers.

    Args:
        case: Question with its answer.
        compare: Function of (prediction, expected) that returns 0 to 1.
    """
    return Scored(max(compare(case.prediction, expected) for expected in case.expected))
