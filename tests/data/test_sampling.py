"""Row sampling, splits, and batches dealt to ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.data.sampling import FILLER, ShardedBatchSampler, sample_rows, split_rows


@given(st.integers(1, 500), st.floats(0.1, 450).map(lambda x: round(x, 1)), st.integers(0, 3))
def test_percent_is_without_replacement_and_repeats_above_100(rows: int, percent: float, seed: int) -> None:
    chosen = Counter(sample_rows(rows, percent, "name", seed).tolist())
    wanted = max(1, int(round(percent * 10) * rows / 1000))
    assert sum(chosen.values()) == wanted
    assert set(chosen) <= set(range(rows))
    counts = [chosen.get(row, 0) for row in range(rows)]
    assert max(counts) - min(counts) <= 1


def test_percent_is_exact_and_seeded() -> None:
    assert len(sample_rows(8, 12.5, "a", 0)) == 1
    assert len(sample_rows(10, 250, "a", 0)) == 25
    assert sample_rows(1000, 30, "a", 0).tolist() == sample_rows(1000, 30, "a", 0).tolist()
    assert sample_rows(1000, 30, "a", 0).tolist() != sample_rows(1000, 30, "b", 0).tolist()
    assert sample_rows(1000, 30, "a", 0).tolist() != sample_rows(1000, 30, "a", 1).tolist()
    assert sample_rows(5, 100, "a", 0).tolist() == [0, 1, 2, 3, 4]


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_is_disjoint_complete_and_repeatable(rows: int, ratio: float, seed: int) -> None:
    train, held_out = split_rows(rows, ratio, seed)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(rows))
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert np.array_equal(split_rows(rows, ratio, seed)[1], held_out)


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2), st.booleans())
def test_ranks_together_hold_every_sample_once(samples: int, batch: int, world: int, epoch: int, shuffle: bool) -> None:
    ranks = []
    for rank in range(world):
        sampler = ShardedBatchSampler(samples, batch, world, rank, shuffle, seed=7)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    assert len({len(batches) for batches in ranks}) == 1
    indices = [index for batches in ranks for one in batches for index in one]
    assert sorted(index for index in indices if index != FILLER) == list(range(samples))
    assert indices.count(FILLER) < batch * world


@given(st.integers(1, 100), st.integers(1, 3))
def test_a_step_holds_the_same_samples_for_any_number_of_ranks(samples: int, batch: int) -> None:
    def steps(world: int, accumulation: int) -> list[set[int]]:
        per_rank = [list(ShardedBatchSampler(samples, batch, world, rank, seed=3)) for rank in range(world)]
        micro = len(per_rank[0])
        return [
            {i for one in per_rank for b in one[start : start + accumulation] for i in b if i != FILLER}
            for start in range(0, micro, accumulation)
        ]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)


def test_epochs_differ_and_repeat() -> None:
    sampler = ShardedBatchSampler(50, 5, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
