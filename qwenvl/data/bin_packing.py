"""Divide samples into packs that are nearly as long as the limit allows. Integers only, no tensors.

Best fit decreasing (Johnson, 1973: at most 11/9 of the best number of packs, plus a constant; on mixtures with many
short samples within a few packs of it), with one change. Unchanged, it puts long samples together with long ones and
leaves packs of hundreds of short texts for the end, so that steps differ in kind and cost. Therefore the longest
samples, which hold three quarters of the tokens, are first spread over all packs, each into the pack with the most
room; the rest fills the gaps, each in the pack with the least room for it. Where this takes more packs, plain best fit
decreasing is used.

Lengths are whole numbers up to the capacity, so packs are kept in buckets by the room they have left, and all samples
of one length go into all packs of one bucket in a single step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

_SPREAD_SHARE = 0.75
"""Share of the tokens that are in spread samples. Measured: with less, packs are mixed less; with more, the rest is too
small to fill the gaps, and there are more packs."""

_FEW = 5
"""Number of packs above the lower bound that mixed packs may cost."""


@dataclass(frozen=True, slots=True)
class Packs:
    """A division of samples into packs.

    Args:
        samples: int64 [n], every sample once, pack after pack.
        borders: int64 [packs + 1]: pack k holds ``samples[borders[k]:borders[k + 1]]``.
    """

    samples: np.ndarray
    borders: np.ndarray

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the samples of one pack: int64 [members]."""
        members: np.ndarray = self.samples[self.borders[index] : self.borders[index + 1]]
        return members

    def pack_of_samples(self) -> np.ndarray:
        """Return the number of the pack that each of ``samples`` is in: int64 [n], ascending."""
        return np.repeat(np.arange(len(self)), np.diff(self.borders))

    def add_up(self, counts: np.ndarray) -> np.ndarray:
        """Return the sums over the samples of every pack.

        Args:
            counts: Counts of each sample: a plain array, or a structured one, whose fields are summed separately.

        Returns:
            An array of the same type, [packs].
        """
        if not len(self):
            return counts[:0]
        if counts.dtype.names is None:
            return np.add.reduceat(counts[self.samples], self.borders[:-1])
        sums = np.empty(len(self), counts.dtype)
        for name in counts.dtype.names:
            sums[name] = np.add.reduceat(counts[name][self.samples], self.borders[:-1])
        return sums


def lower_bound(lengths: np.ndarray, capacity: int) -> int:
    """Return a number of packs that no division can stay below: all tokens over the capacity, rounded up."""
    return -(-int(lengths.sum()) // capacity)


def pack(lengths: np.ndarray, capacity: int, seed: int = 0, weights: np.ndarray | None = None) -> Packs:
    """Divide samples into packs of at most ``capacity`` tokens.

    The same arguments give the same packs. Worked example: lengths 5 4 3 3 2 1 and capacity 6 give packs of lengths
    5+1, 4+2 and 3+3.

    Args:
        lengths: int64 [n], tokens of each sample, from 1 to ``capacity``.
        capacity: Most tokens of a pack (``--model_max_length``).
        seed: Seed of the choice among samples of equal length.
        weights: int64 [n], another quantity to balance between packs, such as image patches: samples of equal length
            are exchanged so that the packs' sums come near each other. The number of packs stays the same.

    Raises:
        ValueError: a length is out of range; the caller leaves out samples that are too long.
    """
    if len(lengths) == 0:
        return Packs(np.empty(0, np.int64), np.zeros(1, np.int64))
    if int(lengths.min()) < 1 or int(lengths.max()) > capacity:
        raise ValueError(f"lengths must lie between 1 and {capacity}, not {lengths.min()} to {lengths.max()}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    pack_of = _fewest(lengths[order], capacity)
    by_pack = np.argsort(pack_of, kind="stable")
    borders = np.concatenate([[0], np.cumsum(np.bincount(pack_of))])
    packs = Packs(order[by_pack], borders.astype(np.int64))
    return packs if weights is None else _even_out(packs, lengths, weights)


def _even_out(packs: Packs, lengths: np.ndarray, weights: np.ndarray) -> Packs:
    """Exchange samples of equal length so that the packs have similar weights.

    For each length, from the longest: its samples are taken out, and put back the heaviest into the lightest pack.
    """
    samples, pack_of, totals = packs.samples.copy(), packs.pack_of_samples(), packs.add_up(weights)
    places = np.argsort(-lengths[samples], kind="stable")
    sorted_lengths = lengths[samples[places]]
    borders = np.flatnonzero(np.diff(sorted_lengths)) + 1
    for of_length in np.split(places, borders):
        members, owners = samples[of_length], pack_of[of_length]
        heavy = weights[members]
        if heavy.min() == heavy.max():
            continue
        np.subtract.at(totals, owners, heavy)
        lightest, heaviest = np.argsort(totals[owners], kind="stable"), np.argsort(-heavy, kind="stable")
        samples[of_length[lightest]] = members[heaviest]
        np.add.at(totals, owners[lightest], heavy[heaviest])
    return replace(packs, samples=samples)


def _fewest(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the pack of every sample, int64 [n], mixed where that takes no more packs, for descending lengths."""
    tokens = np.cumsum(lengths)
    longest = int(np.searchsorted(tokens, _SPREAD_SHARE * tokens[-1]))
    mixed = _assign(lengths, capacity, spread_above=int(lengths[longest]))
    if mixed.max() < lower_bound(lengths, capacity) + _FEW:
        return mixed
    alone = _assign(lengths, capacity, spread_above=capacity)
    return alone if alone.max() < mixed.max() else mixed


def _assign(lengths: np.ndarray, capacity: int, spread_above: int) -> np.ndarray:
    """Return the pack of every sample, int64 [n], for lengths in descending order; the longer ones are spread."""
    starts = np.flatnonzero(np.concatenate([[True], lengths[1:] != lengths[:-1]]))
    stops = np.concatenate([starts[1:], [len(lengths)]])
    pack_of = np.empty(len(lengths), np.int64)
    spreads = int(lengths[0]) > spread_above
    rooms = _Rooms(capacity, lower_bound(lengths, capacity) if spreads else 0)
    for length, start, stop in zip(lengths[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
        place = start
        while place < stop:
            packs = rooms.take(length, stop - place, most=length > spread_above)
            if packs is None:
                pack_of[place:stop] = rooms.open(length, stop - place)
                break
            pack_of[place : place + len(packs)] = packs
            place += len(packs)
    return pack_of


class _Rooms:
    """Open packs by the room they have left.

    Args:
        capacity: Room of an empty pack, in tokens.
        count: Number of packs that are open from the start.
    """

    def __init__(self, capacity: int, count: int) -> None:
        self._capacity = capacity
        self._buckets: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self._occupied = 0  # bit r is set where bucket r holds packs; finds the next one without a search
        self._count = count
        self._add(np.arange(count), capacity)

    def take(self, length: int, wanted: int, *, most: bool) -> np.ndarray | None:
        """Put one sample of ``length`` into each of up to ``wanted`` packs that have the same room.

        Args:
            length: Length of the samples, in tokens.
            wanted: Number of samples.
            most: Whether to choose packs with the most room, rather than with the least that is enough.

        Returns:
            The packs, int64; None where no open pack has room.
        """
        fitting = self._occupied >> length
        if not fitting:
            return None
        room = length + (fitting if most else fitting & -fitting).bit_length() - 1
        bucket = self._buckets[room]
        packs = bucket.pop()
        if len(packs) > wanted:
            bucket.append(packs[wanted:])
            packs = packs[:wanted]
        elif not bucket:
            self._occupied &= ~(1 << room)
        self._add(packs, room - length)
        return packs

    def open(self, length: int, wanted: int) -> np.ndarray:
        """Open packs for ``wanted`` samples of one length, each as full as they make it; returns int64 [wanted]."""
        each = self._capacity // length
        full, rest = divmod(wanted, each)
        packs = np.arange(self._count, self._count + full + (rest > 0))
        self._count += len(packs)
        self._add(packs[:full], self._capacity - each * length)
        self._add(packs[full:], self._capacity - rest * length)
        return np.repeat(packs, each)[:wanted]

    def _add(self, packs: np.ndarray, room: int) -> None:
        if len(packs):
            self._buckets[room].append(packs)
            self._occupied |= 1 << room
