"""Row sampling, splits, and batches dealt to ranks."""

from __future__ import annotations

import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.data.sampler import (
    FILLER,
    SampleOrder,
    ShardedBatchSampler,
    Sharding,
    costs_of_ranks,
    deal,
    imbalance,
    sample_rows,
    split_rows,
)


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


def long_tailed(count: int, seed: int) -> np.ndarray:
    """Costs of packs: most near each other, some far above and below."""
    return np.random.default_rng(seed).lognormal(0, 0.15, count) * 1e12


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    count, seed = draw(st.integers(1, 200)), draw(st.integers(0, 3))
    costs = draw(st.sampled_from([None, long_tailed(count, seed), np.zeros(count), np.arange(count) // 7 * 1.0]))
    lengths = None if costs is None or draw(st.booleans()) else np.random.default_rng(seed).integers(0, 90, count)
    return SampleOrder(count, seed, draw(st.booleans()), costs, lengths)


@given(orders(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2))
def test_ranks_together_hold_every_sample_once(
    order: SampleOrder, batch: int, world: int, accumulation: int, epoch: int
) -> None:
    ranks = []
    for rank in range(world):
        sampler = ShardedBatchSampler(order, Sharding(batch, world, rank, accumulation))
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
        assert all(len(one) == batch for one in ranks[-1])
    assert len({len(batches) for batches in ranks}) == 1
    indices = [index for batches in ranks for one in batches for index in one]
    assert sorted(index for index in indices if index != FILLER) == list(range(order.num_samples))
    assert indices.count(FILLER) < batch * world
    last = [sum(index != FILLER for index in batches[-1]) for batches in ranks]
    assert max(last) - min(last) <= 1  # what is missing is missing on all ranks alike


def steps_of(order: SampleOrder, batch: int, world: int, accumulation: int, epoch: int = 0) -> list[set[int]]:
    """The indices of each optimizer step."""
    ranks = []
    for rank in range(world):
        sampler = ShardedBatchSampler(order, Sharding(batch, world, rank, accumulation))
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
    return [
        {i for rank in ranks for one in rank[start : start + accumulation] for i in one if i != FILLER}
        for start in range(0, len(ranks[0]), accumulation)
    ]


@given(orders(), st.integers(1, 3), st.integers(0, 2))
def test_a_step_holds_the_same_samples_for_any_split(order: SampleOrder, size: int, epoch: int) -> None:
    whole = steps_of(order, size, 1, 4, epoch)
    assert whole == steps_of(order, size, 2, 2, epoch) == steps_of(order, size, 4, 1, epoch)
    assert whole == steps_of(order, 4 * size, 1, 1, epoch) == steps_of(order, 2 * size, 2, 1, epoch)


@pytest.mark.parametrize("balanced", [False, True])
def test_epochs_differ_and_repeat(balanced: bool) -> None:
    order = SampleOrder(50, seed=1, costs=long_tailed(50, 0) if balanced else None)
    first = order.steps(0, 5).tolist()
    assert order.steps(1, 5).tolist() != first
    assert order.steps(0, 5).tolist() == first
    assert SampleOrder(50, seed=2, costs=order.costs).steps(0, 5).tolist() != first
    assert SampleOrder(50, seed=1, shuffle=False).steps(3, 5).tolist() == list(range(50))


@pytest.mark.parametrize("sharding", [Sharding(1, 8), Sharding(1, 8, 0, 4), Sharding(2, 8), Sharding(1, 64)], ids=str)
def test_ranks_are_equally_busy_in_every_round(sharding: Sharding) -> None:
    costs = long_tailed(20_000, 1)
    rounds = costs_of_ranks(costs, SampleOrder(len(costs), costs=costs).steps(0, sharding.step_size), sharding)
    random = costs_of_ranks(costs, SampleOrder(len(costs)).steps(0, sharding.step_size), sharding)
    assert rounds.sum() == pytest.approx(costs.sum())
    assert imbalance(rounds) < 1.015
    assert imbalance(random) > 1.1
    ratio = rounds[:-1].max(axis=1) / rounds[:-1].mean(axis=1)  # the last round may be short
    assert np.quantile(ratio, 0.99) < 1.04
    assert imbalance(rounds[len(rounds) // 2 :]) < 1.02  # not a property of the beginning of an epoch


def test_ascending_costs_are_dealt_back_and_forth() -> None:
    batches = [deal(np.arange(11), Sharding(2, 4, rank)).tolist() for rank in range(4)]
    assert batches == [[[0, 7], [8, FILLER]], [[1, 6], [9, FILLER]], [[2, 5], [10, FILLER]], [[3, 4], [FILLER, FILLER]]]


def test_partners_are_drawn_anew_and_steps_come_in_random_order() -> None:
    costs = long_tailed(4000, 2)
    order = SampleOrder(len(costs), costs=costs)
    first, second = (steps_of(order, 8, 1, 1, epoch) for epoch in (0, 1))
    partners = [{index: step for step in steps for index in step} for steps in (first, second)]
    again = np.mean([len(partners[0][index] & partners[1][index]) - 1 for index in range(len(costs))])
    assert again < 0.5  # of 7 partners
    costliest = [partners[epoch][index] for epoch in (0, 1) for index in np.argsort(costs)[-8:].tolist()]
    assert len({frozenset(step) for step in costliest}) > 2  # even the costliest do not always meet each other
    means = np.array([np.mean(costs[list(step)]) for step in first])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15  # costly steps do not follow each other


@pytest.mark.parametrize(
    ("costs", "lengths", "expected"),
    [
        (None, None, 4253891503),
        ("equal", None, 440763396),
        ("some equal", None, 3572730250),
        ("some equal", "some equal", 3937010529),
        ("all differ", None, 2881285450),
    ],
)
def test_machines_and_versions_agree_on_the_order(costs: str | None, lengths: str | None, expected: int) -> None:
    """Ranks work it out each for themselves, and so does a run that is resumed elsewhere."""
    kinds = {"equal": np.zeros(500), "some equal": np.arange(500) * 7 % 11, "all differ": np.arange(500) * 7 % 499}
    of_costs = None if costs is None else kinds[costs].astype(np.float64)
    of_lengths = None if lengths is None else kinds[lengths].astype(np.int64) + 1
    steps = SampleOrder(500, seed=3, costs=of_costs, lengths=of_lengths).steps(2, 144)
    assert zlib.crc32(steps.astype("<i8").tobytes()) == expected


def test_the_first_epoch_is_number_0() -> None:
    order, sharding = SampleOrder(50, seed=1), Sharding(5)
    sampler = ShardedBatchSampler(order, sharding)
    assert list(sampler) == deal(order.steps(0, 5), sharding).tolist()
    sampler.set_epoch(1)
    assert list(sampler) == deal(order.steps(1, 5), sharding).tolist()


def test_short_step_comes_last_and_is_not_always_the_same() -> None:
    costs = long_tailed(403, 3)
    order = SampleOrder(len(costs), costs=costs)
    last = [steps_of(order, 8, 1, 1, epoch)[-1] for epoch in range(6)]
    assert {len(step) for step in last} == {3}
    assert len({frozenset(step) for step in last}) == 6
    ranks = np.array([np.searchsorted(np.sort(costs), [costs[index] for index in step]).mean() for step in last])
    assert ranks.max() - ranks.min() > 100  # from all over the range of costs


def test_padded_batches_are_of_similar_length() -> None:
    """Text and pictures: the same cost at different lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 4000, 8000)
    costs = lengths * np.where(rng.random(8000) < 0.5, 1.0, 1.8)

    def padding(order: SampleOrder) -> float:
        batches = lengths[order.steps(0, 16)].reshape(-1, 16)
        return float((batches.max(axis=1) * 16).sum() / lengths.sum() - 1)

    by_cost = padding(SampleOrder(8000, costs=costs))
    by_both = padding(SampleOrder(8000, costs=costs, lengths=lengths))
    assert by_both < 0.03 < by_cost / 2
    sharding = Sharding(2, 8)
    order = SampleOrder(8000, costs=costs, lengths=lengths).steps(0, sharding.step_size)
    assert imbalance(costs_of_ranks(costs, order, sharding)) < 1.1
