"""Rank samples by how suspect they are: from their losses in training, from a scoring pass, or both.

Losses are per unit (trained token). Those in training fall while the model learns, so each is compared with the losses
of its like at the same time: samples of the same dataset and of similar length, in a window of steps. A sample's
*excess* is its mean difference from their median, over all times it was trained: the area under its loss, which
separates wrong labels before they are memorized (Pleiss et al., 2020, arXiv 2001.10528, for margins; Huang et al.,
2019, "O2U-Net", for losses). Times when its like differ much among themselves, as at the beginning, weigh less. Divided
by the robust spread of its group it is the score, so that groups of any scale share one list: 0.6745 x deviation / MAD
(Iglewicz and Hoaglin, 1993), of the deviations above the median alone, since losses are skewed. The comparison inside a
group, rather than by one threshold, is that of confident learning (Northcutt et al., 2021, arXiv 1911.00068).

A time counts as *learned* if the loss is not above Tukey's fence of its like (third quartile + 1.5 interquartile
ranges). ``never_learned``: no time in the second half of them is; ``forgotten``: the last time is not, an earlier one
was (Toneva et al., 2019, arXiv 1812.05159).

A scoring pass adds each sample's loss with a blank image and with another sample's. Its *gain* is the smaller of the
two minus the loss with its own image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

OUTLIER = 4.72
"""Least score of ``far_above_like`` and ``worse_with_image``: Tukey's outer fence, third quartile + 3 interquartile
ranges, in standard deviations of a normal distribution."""

SKEWED = 10
"""Fewest values above the median from which their spread is estimated alone; below, one outlier would hide itself."""

NOISE = 0.1
"""Spread of like losses, in nats per unit, from which on a time weighs less."""

FLOOR = 0.01
"""Least spread of a group, in nats per unit: differences below it mean nothing."""

BIN = 200
"""Fewest samples of a group of similar length, where a dataset is split into several."""

WINDOW = 40
"""Losses of like samples at the same time that a loss is compared with."""

SAME = 0.02
"""Largest gain, in nats per unit, that counts as none; or a tenth of the median gain of the dataset."""

REASONS = {
    "far_above_like": "its loss is far above that of samples of the same dataset and length",
    "never_learned": "it was never learned: its loss stayed above that of its like until the end",
    "forgotten": "it was learned and then forgotten",
    "worse_with_image": "its own image makes its answer less likely than a blank or another sample's image",
    "same_without_image": "its answer is as likely without its image",
}
DROPPED = ("far_above_like", "worse_with_image")
"""Reasons that speak most for a wrong label or image, rather than for a sample that is hard or needs no image."""

Key = tuple[str, str, int, int | None]
"""Dataset, file, line and member of a sample."""


@dataclass(frozen=True)
class Losses:
    """Losses of samples in training.

    Args:
        sample: int64 [n], number of the sample of each loss.
        step: int64 [n], optimizer step.
        loss: float64 [n], nats per unit.
    """

    sample: np.ndarray
    step: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class Views:
    """Losses of samples in a scoring pass, nats per unit; NaN where a sample has none.

    Args:
        shown: float64 [samples], with the sample's own images.
        blank: float64 [samples], with blank images.
        swapped: float64 [samples], with another sample's images.
    """

    shown: np.ndarray
    blank: np.ndarray
    swapped: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """Return how much the own images lower the loss against the better of the others: float64 [samples]."""
        return np.fmin(self.blank, self.swapped) - self.shown


@dataclass
class Ranked:
    """A sample in the list.

    Args:
        key: Place of the sample.
        id: The sample's own ``id``.
        score: Greatest score of its evidence; greater is more suspect.
        reasons: Keys of :data:`REASONS`.
        figures: Numbers behind the score, by name.
    """

    key: Key
    id: str | None
    score: float
    reasons: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the line of ``ranking.jsonl``."""
        dataset, file, line, member = self.key
        packed = {} if member is None else {"member": member}
        place = {"dataset": dataset, "file": file, "line": line, **packed, "id": self.id}
        figures = {name: round(value, 5) for name, value in self.figures.items() if np.isfinite(value)}
        return {**place, "score": round(self.score, 4), "reasons": self.reasons, **figures}


def group_like(datasets: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    """Return the number of each sample's group: the same dataset and similar length, int64 [samples].

    Args:
        datasets: Dataset of each sample.
        lengths: float64 [samples], units of each sample.
    """
    names, numbers = np.unique(np.array(datasets, dtype=object).astype(str), return_inverse=True)
    groups, count = np.zeros(len(lengths), np.int64), 0
    for number in range(len(names)):
        mine = np.flatnonzero(numbers == number)
        bins = max(1, min(10, len(mine) // BIN))
        edges = np.unique(np.quantile(lengths[mine], np.linspace(0, 1, bins + 1)[1:-1]))
        groups[mine] = count + np.searchsorted(edges, lengths[mine], side="right")
        count += len(edges) + 1
    return groups


def robust_scores(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return 0.6745 x (value - median) / MAD of each value in its group, the MAD from values above it; NaN for NaN."""
    scores = np.full(len(values), np.nan)
    for mine in _members(groups):
        own = values[mine]
        if np.isfinite(own).any():
            middle = np.nanmedian(own)
            above = own[own > middle] - middle
            deviations = above if len(above) >= SKEWED else np.abs(own - middle)
            spread = np.nanmedian(deviations) / 0.6745
            scores[mine] = (own - middle) / max(spread, FLOOR)
    return scores


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Return the indices of each group, those of a group in ascending order."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []


def compare_times(losses: Losses, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare each loss with those of its like at the same time.

    Args:
        losses: Losses in training.
        groups: int64 [samples], group of each sample.

    Returns:
        float64 [n], differences from the median, nats per unit; float64 [n], their weights; and bool [n], whether the
        loss counts as learned.
    """
    differences, weights = np.zeros(len(losses.loss)), np.ones(len(losses.loss))
    learned = np.ones(len(losses.loss), bool)
    for mine in _members(groups[losses.sample]):
        ordered = mine[np.argsort(losses.step[mine], kind="stable")]
        for window in np.array_split(ordered, max(1, len(ordered) // WINDOW)):
            own = losses.loss[window]
            lower, middle, upper = np.nanquantile(own, (0.25, 0.5, 0.75))
            differences[window] = own - middle
            weights[window] = NOISE / (NOISE + (upper - lower))
            learned[window] = own <= upper + max(1.5 * (upper - lower), FLOOR)
    return differences, weights, learned


@dataclass(frozen=True)
class Times:
    """What the losses in training say of each sample.

    Args:
        excess: float64 [samples], weighted mean difference from its like; NaN for samples that were not trained.
        last: float64 [samples], the last loss.
        count: int64 [samples], number of times trained.
        never: bool [samples], ``never_learned``.
        forgotten: bool [samples], ``forgotten``.
    """

    excess: np.ndarray
    last: np.ndarray
    count: np.ndarray
    never: np.ndarray
    forgotten: np.ndarray


def summarize_times(losses: Losses, groups: np.ndarray) -> Times:
    """Summarize the losses of each sample."""
    samples = len(groups)
    differences, weights, learned = compare_times(losses, groups)
    count = np.bincount(losses.sample, minlength=samples)
    with np.errstate(invalid="ignore"):
        sums = np.bincount(losses.sample, differences * weights, samples)
        excess = sums / np.bincount(losses.sample, weights, samples)
    last, never, forgotten = np.full(samples, np.nan), np.zeros(samples, bool), np.zeros(samples, bool)
    order = np.lexsort((losses.step, losses.sample))
    for times in _members_of_sorted(losses.sample[order]):
        own = order[times]
        number = losses.sample[own[0]]
        last[number] = losses.loss[own[-1]]
        if len(own) > 1:
            never[number] = not learned[own[len(own) // 2 :]].any()
            forgotten[number] = learned[own[:-1]].any() and not learned[own[-1]] and not never[number]
    return Times(excess, last, count, never, forgotten)


def _members_of_sorted(values: np.ndarray) -> list[np.ndarray]:
    return np.split(np.arange(len(values)), np.flatnonzero(np.diff(values)) + 1) if len(values) else []


@dataclass(frozen=True)
class Evidence:
    """All that is known of the samples.

    Args:
        keys: Place of each sample.
        ids: Its own ``id``.
        lengths: float64 [samples], units of each sample.
        losses: Losses in training; None for none.
        views: Losses of a scoring pass; None for none.
    """

    keys: Sequence[Key]
    ids: Sequence[str | None]
    lengths: np.ndarray
    losses: Losses | None = None
    views: Views | None = None


def rank_samples(evidence: Evidence) -> list[Ranked]:
    """Return all samples, the most suspect first."""
    groups = group_like([key[0] for key in evidence.keys], evidence.lengths)
    ranked = [Ranked(key, name, -np.inf) for key, name in zip(evidence.keys, evidence.ids, strict=True)]
    if evidence.losses is not None:
        _add_times(ranked, summarize_times(evidence.losses, groups), groups)
    if evidence.views is not None:
        _add_views(ranked, evidence.views, groups, [key[0] for key in evidence.keys])
    for one in ranked:
        one.score = one.score if np.isfinite(one.score) else 0.0
    return sorted(ranked, key=lambda one: (-one.score, -len(one.reasons), one.key[:3], one.key[3] or 0))


def _add_times(ranked: Sequence[Ranked], times: Times, groups: np.ndarray) -> None:
    scores = robust_scores(times.excess, groups)
    for number, one in enumerate(ranked):
        if not times.count[number]:
            continue
        one.figures |= {"excess": times.excess[number], "last_loss": times.last[number]}
        one.figures["times"] = int(times.count[number])
        _raise(one, scores[number], "far_above_like")
        one.reasons += ["never_learned"] * bool(times.never[number]) + ["forgotten"] * bool(times.forgotten[number])


def _add_views(ranked: Sequence[Ranked], views: Views, groups: np.ndarray, datasets: Sequence[str]) -> None:
    high, gain = robust_scores(views.shown, groups), views.gain
    worse = robust_scores(-gain, groups)
    numbers = np.unique(np.array(datasets, dtype=object).astype(str), return_inverse=True)[1]
    typical = np.zeros(len(gain))
    for mine in _members(numbers):
        typical[mine] = np.nanmedian(gain[mine]) if np.isfinite(gain[mine]).any() else np.nan
    for number, one in enumerate(ranked):
        if not np.isfinite(views.shown[number]):
            continue
        found = {"loss": views.shown[number], "loss_blank": views.blank[number], "loss_swapped": views.swapped[number]}
        one.figures |= found
        _raise(one, high[number], "far_above_like")
        if not np.isfinite(gain[number]):  # it has no image
            continue
        none = max(SAME, 0.1 * typical[number])
        if gain[number] < -none:
            _raise(one, worse[number], "worse_with_image")
        elif gain[number] <= none:
            one.reasons.append("same_without_image")


def _raise(one: Ranked, score: float, reason: str) -> None:
    """Raise a sample's score, and add the reason if it is an outlier."""
    if np.isfinite(score):
        one.score = max(one.score, float(score))
        if score >= OUTLIER and reason not in one.reasons:
            one.reasons.append(reason)


def count_reasons(ranked: Sequence[Ranked]) -> Mapping[tuple[str, str], int]:
    """Return the number of samples of each (dataset, reason), and of each (dataset, "") with none."""
    counts: dict[tuple[str, str], int] = {}
    for one in ranked:
        for reason in one.reasons or [""]:
            counts[one.key[0], reason] = counts.get((one.key[0], reason), 0) + 1
    return counts
