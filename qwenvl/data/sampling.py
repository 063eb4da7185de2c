"""Which rows are used, in which order, and which rank gets which. Integers only."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from torch.utils.data import Sampler

FILLER = -1
"""Index that stands for no sample: it fills the last step of an epoch, so that all ranks take equally many."""


def sample_rows(num_rows: int, percent: float, name: str, seed: int) -> np.ndarray:
    """Return the rows of a dataset that ``name%percent`` uses: int64, ascending within each repeat.

    Without replacement; above 100 every row is used as often as it fits, and the rest sampled: 250 is all rows twice
    and half of them a third time. The same on every rank and in every run. At least one row is used.

    Args:
        num_rows: rows of the dataset.
        percent: above 0; decimals are exact ("12.5" of 8 rows is 1).
        name: registry name; different datasets are sampled differently.
        seed: the run's data seed.
    """
    wanted = max(1, int(Fraction(str(percent)) * num_rows / 100))
    repeats, rest = divmod(wanted, num_rows)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    some = np.sort(rng.permutation(num_rows)[:rest])
    return np.concatenate([np.tile(np.arange(num_rows), repeats), some]).astype(np.int64)


def split_rows(num_rows: int, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off ``ratio`` of the rows for evaluation: (training rows, evaluation rows), int64, ascending, disjoint.

    Both get at least one row where there are two. The same on every rank and in every run.
    """
    count = min(max(1, round(num_rows * ratio)), num_rows - 1)
    order = np.random.default_rng([seed, 1]).permutation(num_rows)
    return np.sort(order[count:]), np.sort(order[:count])


class ShardedBatchSampler(Sampler[list[int]]):
    """Gives every rank its batches of one epoch; together they hold each index exactly once.

    Batches are dealt to the ranks in turn, so that an optimizer step sees the same samples however they are split
    over ranks and accumulation steps: 1 rank with 4 accumulation steps and 2 ranks with 2 get the same four batches.
    What is missing at the end of an epoch is filled with :data:`FILLER`, which trains nothing.

    Args:
        num_samples: indices are 0 to this, excluded.
        batch_size: indices a batch.
        world_size: number of ranks.
        rank: this rank.
        shuffle: a new order each epoch; otherwise ascending.
        seed: of the order.
    """

    def __init__(
        self, num_samples: int, batch_size: int, world_size: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.world_size = world_size
        self.rank = rank
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)
        padded = np.full(len(self) * self.world_size * self.batch_size, FILLER)
        padded[: self.num_samples] = order
        for batch in padded.reshape(len(self), self.world_size, self.batch_size)[:, self.rank]:
            yield batch.tolist()
