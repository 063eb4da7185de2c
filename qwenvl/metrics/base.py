"""What metrics take and give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Total = Callable[[np.ndarray, int], float]
"""(statistics of samples, summed: float64 [k]; number of samples) to the score of all of them together."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answered question.

    Args:
        question: what was asked.
        expected: answers that are right; one or more.
        prediction: what was answered.
    """

    question: str
    expected: tuple[str, ...]
    prediction: str


@dataclass(frozen=True, slots=True)
class Scored:
    """How good one answer is.

    Args:
        value: 0 to 1.
        readable: the answer has the form that the metric reads; one that does not counts as wrong.
        statistics: what is summed over samples where the score of all is not the mean of ``value``.
    """

    value: float
    readable: bool = True
    statistics: tuple[float, ...] = ()


def mean(sums: np.ndarray, count: int) -> float:
    """Return the mean of the first statistic."""
    return float(sums[0]) / count if count else 0.0


@dataclass(frozen=True)
class Metric:
    """A way to measure answers.

    Args:
        name: of the ``--metric`` flag.
        title: for tables.
        source: where it comes from.
        score: of one answer.
        total: of all together; the mean of the values unless said otherwise.
    """

    name: str
    title: str
    source: str
    score: Callable[[Case], Scored]
    total: Total = mean

    def statistics(self, scored: Scored) -> tuple[float, ...]:
        """Return what :attr:`total` takes the sum of."""
        return scored.statistics or (scored.value,)


def best(case: Case, compare: Callable[[str, str], float]) -> Scored:
    """Return the best score against any of the expected answers.

    Args:
        case: the answer.
        compare: (prediction, expected) to 0 to 1.
    """
    return Scored(max(compare(case.prediction, expected) for expected in case.expected))
