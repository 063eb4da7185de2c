"""Choose rows, order them, and split them over ranks. Integers only."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from torch.utils.data import Sampler

FILLER = -1
"""Index that stands for no sample: it fills the last step of an epoch, so that all ranks take the same number."""

_STEPS_OF_SIMILAR_LENGTH = 8
"""Steps of similar cost that are sorted by length together: measured, more of them cost more balance than padding."""


def sample_rows(num_rows: int, percent: float, name: str, seed: int) -> np.ndarray:
    """Return the rows of a dataset that ``name%percent`` uses: int64, ascending within each repeat.

    Sampling is without replacement. Above 100 percent, every row is used as often as it fits and the rest is sampled:
    250 is all rows twice and half of them a third time. The result is the same on every rank and in every run, and has
    at least one row.

    Args:
        num_rows: Number of rows of the dataset.
        percent: Percentage, above 0; decimals are exact ("12.5" of 8 rows is 1).
        name: Registry name; different datasets are sampled differently.
        seed: Data seed of the run.
    """
    wanted = max(1, int(Fraction(str(percent)) * num_rows / 100))
    repeats, rest = divmod(wanted, num_rows)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    some = np.sort(rng.permutation(num_rows)[:rest])
    return np.concatenate([np.tile(np.arange(num_rows), repeats), some]).astype(np.int64)


def split_rows(num_rows: int, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off ``ratio`` of the rows for evaluation: (training rows, evaluation rows), int64, ascending, disjoint.

    Both get at least one row where there are two. The result is the same on every rank and in every run.
    """
    count = min(max(1, round(num_rows * ratio)), num_rows - 1)
    order = np.random.default_rng([seed, 1]).permutation(num_rows)
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True, slots=True)
class Sharding:
    """Split of the indices of an epoch over batches and ranks.

    Args:
        batch_size: Indices per batch.
        world_size: Number of ranks.
        rank: Rank of this process.
        accumulation: Batches of a rank per optimizer step.
    """

    batch_size: int
    world_size: int = 1
    rank: int = 0
    accumulation: int = 1

    @property
    def round_size(self) -> int:
        """Indices of one batch of every rank."""
        return self.batch_size * self.world_size

    @property
    def step_size(self) -> int:
        """Indices of one optimizer step, over all ranks."""
        return self.round_size * self.accumulation


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """The order of the indices in every epoch; each epoch holds every index once.

    With ``costs``, a step holds indices of nearly equal cost, and never mixes the costliest with the cheapest. Which
    indices share a step is drawn anew for each epoch: in the order of costs, every index first moves by a random number
    of places, among indices that cost up to ``tolerance`` more (and at least among as many as one step holds). The
    order of the steps is random. Without ``costs``, the order of the indices is random.

    The arithmetic is exact in IEEE 754, without a logarithm, so that ranks on different machines agree.

    Args:
        num_samples: Number of indices, which count from 0.
        seed: Seed of the order.
        shuffle: Whether each epoch has a new order, rather than the ascending one.
        costs: float64 [num_samples], training cost of each index; None to leave steps unbalanced.
        lengths: int64 [num_samples], given where batches are padded to their longest sample: among indices of similar
            cost, a step then holds indices of similar length.
        tolerance: Relative difference of the costs within a step, where there are enough indices: 0.02 is 2 %.
    """

    num_samples: int
    seed: int = 0
    shuffle: bool = True
    costs: np.ndarray | None = None
    lengths: np.ndarray | None = None
    tolerance: float = 0.02

    def steps(self, epoch: int, step_size: int) -> np.ndarray:
        """Return the indices of an epoch: int64 [num_samples]; every ``step_size`` of them make one step.

        Within a step they ascend by cost (by length where lengths are given). A short step comes last, and is taken
        from another place in the order of costs in each epoch.

        Args:
            epoch: Number of the epoch, from 0.
            step_size: Indices of one optimizer step over all ranks; the order depends on nothing else of the split.
        """
        if not self.shuffle:
            return np.arange(self.num_samples)
        rng = np.random.default_rng([self.seed, epoch])
        if self.costs is None:
            return rng.permutation(self.num_samples)
        order = _shifted(self.costs, self.tolerance, step_size, rng)
        inside = self.costs
        if self.lengths is not None:
            inside = self.lengths
            order = _sorted_in_blocks(order, inside, _STEPS_OF_SIMILAR_LENGTH * step_size)
        full, rest = divmod(self.num_samples, step_size)
        start = int(rng.integers(full + 1)) * step_size
        short, order = order[start : start + rest], np.delete(order, slice(start, start + rest))
        order = _sorted_in_blocks(order, inside, step_size).reshape(full, step_size)
        return np.concatenate([order[rng.permutation(full)].ravel(), short[np.argsort(inside[short], kind="stable")]])


def _shifted(costs: np.ndarray, tolerance: float, least: int, rng: np.random.Generator) -> np.ndarray:
    """Return indices in ascending order of cost after each has moved up by a random number of places.

    It moves among the indices that cost up to 1 + ``tolerance`` times as much, or among the next ``least``, whichever
    are more.
    """
    order = np.argsort(costs, kind="stable")
    ascending = costs[order]
    places = np.arange(len(costs))
    reach = np.maximum(np.searchsorted(ascending, ascending * (1 + tolerance), side="right") - places, least)
    moved: np.ndarray = order[np.argsort(places + reach * rng.random(len(costs)), kind="stable")]
    return moved


def _sorted_in_blocks(order: np.ndarray, keys: np.ndarray, block: int) -> np.ndarray:
    """Return ``order`` with each block of so many indices sorted by their keys; a short last block too."""
    blocks = np.arange(len(order)) // block
    by_key: np.ndarray = order[np.lexsort((keys[order], blocks))]
    return by_key


def deal(order: np.ndarray, sharding: Sharding) -> np.ndarray:
    """Return the batches of one rank: int64 [batches, batch_size], :data:`FILLER` where indices are missing at the end.

    Each rank in turn gets one index, in reverse order of ranks in every other round: where indices ascend by cost, all
    ranks get nearly the same total, and the number of missing indices at the end is spread over the ranks. Every
    ``round_size`` indices of the order make one batch of every rank: 1 rank with 4 accumulation steps and 2 ranks with
    2 train on the same indices in each optimizer step.
    """
    rounds = -(-len(order) // sharding.round_size)
    padded = np.full(rounds * sharding.round_size, FILLER)
    padded[: len(order)] = order
    dealt = padded.reshape(rounds, sharding.batch_size, sharding.world_size)
    forth, back = dealt[:, ::2, sharding.rank], dealt[:, 1::2, sharding.world_size - 1 - sharding.rank]
    batches = np.empty((rounds, sharding.batch_size), np.int64)
    batches[:, ::2], batches[:, 1::2] = forth, back
    return batches


def costs_of_ranks(costs: np.ndarray, order: np.ndarray, sharding: Sharding) -> np.ndarray:
    """Return the cost of each rank's batch: float64 [rounds, ranks]; in each round, all wait for the costliest.

    Args:
        costs: float64 [n], cost of each index.
        order: Indices of an epoch.
        sharding: Split of the indices; its own rank does not matter.
    """
    known = np.append(costs, 0.0)  # FILLER is -1, the last place
    ranks = (deal(order, replace(sharding, rank=rank)) for rank in range(sharding.world_size))
    return np.stack([known[batches].sum(axis=1) for batches in ranks], axis=1)


def imbalance(costs: np.ndarray) -> float:
    """Return the time of ranks that wait for each other in each round over their time without waiting; at least 1.

    Args:
        costs: float64 [rounds, ranks].
    """
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())


class ShardedBatchSampler(Sampler[list[int]]):
    """Gives one rank its batches of one epoch; all ranks together hold each index exactly once.

    Args:
        order: Order of the indices.
        sharding: Split of the indices, with the rank of this process.
    """

    def __init__(self, order: SampleOrder, sharding: Sharding) -> None:
        self.order = order
        self.sharding = sharding
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.order.num_samples // self.sharding.round_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in deal(self.order.steps(self.epoch, self.sharding.step_size), self.sharding):
            yield batch.tolist()
