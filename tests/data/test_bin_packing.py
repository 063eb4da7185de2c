"""Packs: every sample once, none too long, nearly full."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.data.bin_packing import _FEW, _SPREAD_SHARE, _assign, _fewest, lower_bound, pack


def mixture(count: int, capacity: int, seed: int) -> np.ndarray:
    """Lengths of a long-tailed mixture: many short texts, pictures, and some long videos."""
    rng = np.random.default_rng(seed)
    parts = [rng.lognormal(5.5, 1.0, count // 2), rng.lognormal(6.5, 0.8, count // 4)]
    parts.append(rng.normal(capacity * 0.4, capacity * 0.15, count - sum(map(len, parts))))
    return np.clip(np.concatenate(parts), 8, capacity).astype(np.int64)


@given(st.integers(1, 50), st.data())
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(capacity: int, data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), dtype=np.int64)
    weights = data.draw(st.sampled_from([None, lengths, np.arange(len(lengths)) % 5]))
    packs = pack(lengths, capacity, data.draw(st.integers(0, 3)), weights)
    members = [packs[index].tolist() for index in range(len(packs))]
    assert sorted(sample for one in members for sample in one) == list(range(len(lengths)))
    assert all(one for one in members)
    assert all(lengths[one].sum() <= capacity for one in members)
    if len(packs):
        assert packs.add_up(lengths).tolist() == [int(lengths[one].sum()) for one in members]
    # Two packs that fit into one would be a fit missed: at most one is half empty.
    assert sum(2 * lengths[one].sum() <= capacity for one in members) <= 1


def test_packs_are_mixtures() -> None:
    """Long and short samples share packs, and so do texts and pictures of one length."""
    lengths = mixture(50_000, 8192, 0)
    patches = 4 * lengths * (np.random.default_rng(0).random(len(lengths)) < 0.5)
    plain, even = pack(lengths, 8192), pack(lengths, 8192, weights=patches)
    assert len(plain) == len(even)
    assert np.quantile(np.diff(even.borders), 0.99) < 50  # not hundreds of short ones
    assert np.corrcoef(even.add_up(lengths), plain.add_up(lengths))[0, 1] > 0.99  # exchanges keep the lengths
    assert even.add_up(patches).std() < 0.6 * plain.add_up(patches).std()


@pytest.mark.parametrize(
    ("capacity", "lengths"),
    [
        (24, [13, 10, 18, 5, 11, 17, 23, 20, 7, 17, 8, 11, 17, 11, 4]),
        (10, [3, 3, 3, 3, 6, 1]),
        (9, [5, 5, 5, 2, 2, 2, 2]),
    ],
)
def test_packs_that_are_opened_together_keep_the_room_that_each_has(capacity: int, lengths: list[int]) -> None:
    """The last of several that are opened for samples of one length is often less full than the others."""
    packs = pack(np.array(lengths), capacity)
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))
    assert int(packs.add_up(np.array(lengths)).max()) <= capacity


def test_a_mixture_is_kept_where_best_fit_alone_takes_as_many_packs() -> None:
    lengths = np.array([19, 19, 18, 17, 17, 16, 16, 15, 15, 15, 15, 14, 14, 14, 14, 14, 13, 12, 12, 11])
    longest = int(np.searchsorted(lengths.cumsum(), _SPREAD_SHARE * lengths.sum()))
    mixed = _assign(lengths, 25, spread_above=int(lengths[longest]))
    alone = _assign(lengths, 25, spread_above=25)
    assert mixed.max() == alone.max() >= lower_bound(lengths, 25) + _FEW
    assert mixed.tolist() != alone.tolist()
    assert _fewest(lengths, 25).tolist() == mixed.tolist()


def test_many_samples_of_one_size_take_no_more_packs_than_best_fit_needs() -> None:
    """Spreading alone would put one long sample into each pack, and the next longest on top of it."""
    lengths = np.random.default_rng(0).normal(900, 250, 20_000).clip(200, 8192).astype(np.int64)
    assert len(pack(lengths, 8192)) - lower_bound(lengths, 8192) <= 9  # 12 when spread
    pairs = np.repeat([5000, 3192], 1000)
    assert len(pack(pairs, 8192)) == 1000


@pytest.mark.parametrize("seed", range(3))
def test_a_long_tailed_mixture_fills_packs_to_within_five_of_the_best(seed: int) -> None:
    lengths = mixture(100_000, 8192, seed)
    packs = pack(lengths, 8192, seed)
    assert len(packs) - lower_bound(lengths, 8192) <= 5
    assert lengths.sum() / (len(packs) * 8192) > 0.9995


def test_memory_grows_by_few_bytes_a_sample() -> None:
    lengths = mixture(100_000, 8192, 0)
    tracemalloc.start()
    pack(lengths, 8192)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(lengths)  # 100 MB for a million


def test_sums_of_packs() -> None:
    records = np.zeros(5, [("tokens", np.int64), ("patches", np.int64)])
    records["tokens"], records["patches"] = [4, 3, 2, 2, 1], [0, 40, 0, 20, 1]
    packs = pack(records["tokens"], 5)
    sums = packs.add_up(records)
    members = [packs[index] for index in range(len(packs))]
    assert sums["patches"].tolist() == [int(records["patches"][one].sum()) for one in members]
    assert sums["tokens"].tolist() == packs.add_up(records["tokens"]).tolist()
    assert packs.pack_of_samples().tolist() == [number for number, one in enumerate(members) for _ in one]


def test_worked_example_and_seeds() -> None:
    lengths = np.array([5, 4, 3, 3, 2, 1])
    packs = pack(lengths, 6)
    assert sorted(sorted(lengths[packs[i]].tolist()) for i in range(len(packs))) == [[1, 5], [2, 4], [3, 3]]
    many = mixture(2000, 512, 0)
    assert pack(many, 512, 1).samples.tolist() == pack(many, 512, 1).samples.tolist()
    assert pack(many, 512, 1).samples.tolist() != pack(many, 512, 2).samples.tolist()


@pytest.mark.parametrize(("weights", "expected"), [(False, 3377967977), (True, 3011764762)])
def test_machines_and_versions_agree_on_the_packs(weights: bool, expected: int) -> None:
    """Plans and resumed runs rest on them. Many samples are equally long, and many weigh the same."""
    lengths = mixture(2000, 512, 0)
    packs = pack(lengths, 512, 1, np.arange(2000) % 5 * 40 if weights else None)
    assert zlib.crc32(packs.samples.astype("<i8").tobytes() + packs.borders.astype("<i8").tobytes()) == expected


def test_the_heavier_of_equally_long_samples_go_where_the_others_weigh_less() -> None:
    """Worked by hand: packs of 6 and 4 tokens, the long ones weigh 0 10 20, so the short ones go in the other order."""
    lengths, weights = np.array([6, 6, 6, 4, 4, 4]), np.array([0, 10, 20, 5, 15, 25])
    packs = pack(lengths, 10, weights=weights)
    assert packs.add_up(lengths).tolist() == [10, 10, 10]
    assert sorted(packs.add_up(weights).tolist()) == [25, 25, 25]


def test_lengths_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 8"):
        pack(np.array([3, 9]), 8)
    with pytest.raises(ValueError, match="between 1 and 8"):
        pack(np.array([0]), 8)
    assert len(pack(np.array([], dtype=np.int64), 8)) == 0
