"""Metrics of the predictions of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def classification_metrics(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return accuracy, and macro F1: the mean of F1 over the classes that are predicted or expected.

    Args:
        predicted: int64 [n], indices of classes.
        expected: int64 [n], indices of classes.
    """
    classes = np.union1d(predicted, expected)
    hits = predicted == expected
    scores = [
        _f1((hits & (expected == one)).sum(), (predicted == one).sum(), (expected == one).sum()) for one in classes
    ]
    return {"accuracy": float(hits.mean()), "macro_f1": float(np.mean(scores))}


def _f1(hits: float, predicted: float, expected: float) -> float:
    """Return 2 hits / (predicted + expected); 0 where there are none of either."""
    return float(2 * hits / (predicted + expected)) if predicted + expected else 0.0


def confusion_matrix(predicted: np.ndarray, expected: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 [classes, classes]: counts of each pair of expected class (row) and predicted class (column)."""
    return np.bincount(expected * classes + predicted, minlength=classes**2).reshape(classes, classes)


def multilabel_metrics(probabilities: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return the mean average precision, and F1 at 0.5, micro and macro.

    Args:
        probabilities: [n, classes].
        expected: bool [n, classes]. A class that no sample has is left out of the mean average precision.
    """
    chosen = probabilities >= 0.5
    hits = chosen & expected
    precisions = [average_precision(probabilities[:, one], expected[:, one]) for one in np.flatnonzero(expected.any(0))]
    of_classes = [_f1(*counts) for counts in zip(hits.sum(0), chosen.sum(0), expected.sum(0), strict=True)]
    return {
        "map": float(np.mean(precisions)) if precisions else math.nan,
        "micro_f1": _f1(hits.sum(), chosen.sum(), expected.sum()),
        "macro_f1": float(np.mean(of_classes)),
    }


def average_precision(scores: np.ndarray, expected: np.ndarray) -> float:
    """Return the sum over thresholds of precision x the recall that is gained; equal scores are one threshold.

    Args:
        scores: [n].
        expected: bool [n], at least one of them true.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # ends of runs of equal scores
    hits = np.cumsum(expected[order])[last]
    gained = np.diff(hits, prepend=0) / expected.sum()
    return float((gained * hits / (last + 1)).sum())


def regression_metrics(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return mean absolute error, root of the mean square, and R2, each the mean over the numbers of a label.

    Args:
        predicted: [n, numbers], in the unit of the labels.
        expected: [n, numbers]. A number that never changes is left out of R2, which is NaN if none is left.
    """
    apart = predicted - expected
    left, spread = (apart**2).sum(0), ((expected - expected.mean(0)) ** 2).sum(0)
    varies = spread > 0
    return {
        "mae": float(np.abs(apart).mean()),
        "rmse": float(np.sqrt((apart**2).mean(0)).mean()),
        "r2": float((1 - left[varies] / spread[varies]).mean()) if varies.any() else math.nan,
    }


def ranking_metrics(scores: Sequence[np.ndarray], relevances: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the means over samples of pairwise accuracy, NDCG and Kendall's tau-b.

    Args:
        scores: Scores of the images of each sample.
        relevances: Relevances of the images of each sample, from 0 up and not all equal.
    """
    pairs = list(zip(scores, relevances, strict=True))
    return {
        "pairwise_accuracy": float(np.mean([_ordered_pairs(*one) for one in pairs])),
        "ndcg": float(np.mean([ndcg(*one) for one in pairs])),
        "kendall_tau": float(np.mean([kendall_tau(*one) for one in pairs])),
    }


def _ordered_pairs(scores: np.ndarray, relevances: np.ndarray) -> float:
    """Return the share of pairs of different relevance in the right order; a pair with equal scores counts half."""
    more = relevances[:, None] > relevances[None, :]
    above = (np.sign(scores[:, None] - scores[None, :]) + 1) / 2
    return float(above[more].mean())


def kendall_tau(scores: np.ndarray, relevances: np.ndarray) -> float:
    """Return tau-b (Kendall, 1945), the rank correlation with a correction for ties; 0 if all scores are equal."""
    first, second = (np.sign(one[:, None] - one[None, :]) for one in (scores, relevances))
    pairs = math.sqrt(float((first != 0).sum()) * float((second != 0).sum()))
    return float((first * second).sum() / pairs) if pairs else 0.0


def ndcg(scores: np.ndarray, relevances: np.ndarray) -> float:
    """Return the sum of relevance / log2(1 + rank), divided by that of the best order (Järvelin and Kekäläinen, 2002).

    Images with equal scores share the mean of their discounts.
    """
    discounts = 1 / np.log2(np.arange(2, len(scores) + 2))
    _, groups, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    shared = np.bincount(np.repeat(np.arange(len(counts)), counts), discounts) / counts
    return float((relevances * shared[groups]).sum() / (np.sort(relevances)[::-1] * discounts).sum())
