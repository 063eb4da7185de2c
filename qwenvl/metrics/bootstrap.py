"""Confidence intervals by resampling samples (Efron 1979; percentiles)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qwenvl.metrics.base import Total

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % confidence interval.

    Args:
        value: Score of all samples.
        low: 2.5th percentile of the resamples.
        high: 97.5th percentile of the resamples.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float]:
        """Return the figures as a dict for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def score_interval(statistics: np.ndarray, total: Total, seed: int = 0) -> Interval:
    """Return the score of all samples with its interval.

    Args:
        statistics: float64 [n, k], statistics of each sample.
        total: Function from summed statistics to the score.
        seed: Seed of the resampling.
    """
    count = len(statistics)
    found = [total(weights @ statistics, count) for weights in _resamples(count, seed)]
    return _interval(total(statistics.sum(axis=0), count), found)


def difference_interval(one: np.ndarray, other: np.ndarray, total: Total, seed: int = 0) -> Interval:
    """Return the difference of two scores of the same samples, with its interval (paired resampling).

    Args:
        one: float64 [n, k], statistics of each sample.
        other: float64 [n, k], statistics to subtract, of the same samples in the same order.
        total: Function from summed statistics to the score.
        seed: Seed of the resampling.
    """
    assert one.shape == other.shape, (one.shape, other.shape)
    count = len(one)
    found = [total(weights @ one, count) - total(weights @ other, count) for weights in _resamples(count, seed)]
    return _interval(total(one.sum(axis=0), count) - total(other.sum(axis=0), count), found)


def _resamples(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each sample is drawn: float64 [count]."""
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)


def _interval(value: float, found: list[float]) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(found, [tail, 100 - tail]).tolist()
    return Interval(value, low, high)
