"""Samples that repeat an earlier one, and training samples whose images or texts evaluation shows too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qwenvl.data.duplicates.contents import Contents
from qwenvl.data.duplicates.image_hashes import BLANK, IMAGE, VIEWS
from qwenvl.data.duplicates.matching import closest_views, clusters, in_common, mixed, similar_images, similar_texts
from qwenvl.utils.errors import Origin


@dataclass(frozen=True, slots=True)
class Place:
    """A sample: number of its table, its row, and its place in the row, from 0."""

    table: int
    row: int
    member: int


@dataclass(frozen=True, slots=True)
class Match:
    """A training sample that repeats another one.

    Args:
        sample: The training sample.
        other: The sample that it repeats: an earlier one of the training data, or one of the evaluation data.
        leak: Whether the other one is evaluation data, which comes after the training data in the numbers of tables.
        view: Change that makes the other sample's image this one's; empty if none is needed.
        in_common: Share of the runs of three words that both texts have in common, estimated.
        has_media: Whether the samples have images or clips.
    """

    sample: Place
    other: Place
    leak: bool
    view: str
    in_common: float
    has_media: bool

    @property
    def category(self) -> str:
        """Name of the problem."""
        return "leak" if self.leak else "near_duplicate"

    def reason(self, other: Origin) -> str:
        """Return the problem in words.

        Args:
            other: Origin of the other sample.
        """
        view = f" ({self.view})" if self.view else ""
        if self.leak:
            what = f"its image or clip{view}" if self.has_media else f"{self.in_common:.0%} of its text"
            return f"{what} is in the evaluation data too: {other}. Take one of them out, or the score there says less."
        media = f"the same media{view} and " if self.has_media else ""
        return f"it has {media}{self.in_common:.0%} of its text in common with {other}. Remove one of them."


class _Samples:
    """The samples of several tables, one after the other.

    Args:
        parts: Contents of each table.
    """

    def __init__(self, parts: Sequence[Contents]) -> None:
        self.tables = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
        self.rows, self.members, self.texts, self.signatures, media, counts, features = (
            np.concatenate([getattr(part, name) for part in parts]) for name in Contents.__slots__
        )
        self.features = features[np.unique(features["key"], return_index=True)[1]]
        self.media = np.searchsorted(self.features["key"], media)  # int64 [media], places in features
        self.counts = counts
        self.starts = np.cumsum(counts) - counts
        self.owners = np.repeat(np.arange(len(counts)), counts)  # int64 [media], the sample of each
        pairs = np.concatenate([similar_images(self.features)[0], _equal_digests(self.features)])
        self.shown = clusters(len(self.features), pairs)[self.media]  # int64 [media]

    def groups(self) -> np.ndarray:
        """Return a number for each sample, the same for the same media in the same order, uint64 [samples]."""
        places = np.arange(len(self.media)) - self.starts[self.owners]
        groups = np.zeros(len(self.rows), np.uint64)
        np.add.at(groups, self.owners, mixed(mixed(self.shown.astype(np.uint64)) + places.astype(np.uint64)))
        return groups

    def place(self, sample: int) -> Place:
        """Return where a sample is."""
        return Place(int(self.tables[sample]), int(self.rows[sample]), int(self.members[sample]))


def _equal_digests(features: np.ndarray) -> np.ndarray:
    others = np.flatnonzero(features["kind"] != IMAGE)
    _, first, which = np.unique(features["digest"][others], return_index=True, return_inverse=True)
    return np.stack([others[first[which]], others], axis=1)


def find_matches(train: Sequence[Contents], evaluation: Sequence[Contents] = ()) -> list[Match]:
    """Return the training samples that repeat an earlier one, or show what evaluation shows; the latter come last.

    A sample repeats one that has the same media in the same order, each nearly the same in one of
    :data:`~qwenvl.data.duplicates.image_hashes.VIEWS`, and nearly the same words. It leaks if one of its images or
    clips is in the evaluation data, whatever is asked about it, or, where it has none, its words.
    """
    if not sum(len(part.rows) for part in (*train, *evaluation)):
        return []
    samples = _Samples([*train, *evaluation])
    trained = sum(len(part.rows) for part in train)
    pairs = similar_texts(samples.texts, samples.signatures, samples.groups())
    repeated = _earliest(pairs[(pairs < trained).all(axis=1)])
    shown = _shown_in_evaluation(samples, trained)
    texts = pairs[(pairs[:, 0] < trained) & (pairs[:, 1] >= trained) & (samples.counts[pairs[:, 0]] == 0)]
    leaks = np.concatenate([shown, _earliest(texts[:, ::-1])])
    return [*_describe(samples, repeated, leak=False), *_describe(samples, leaks, leak=True)]


def _earliest(pairs: np.ndarray) -> np.ndarray:
    """Return each second sample of some pairs once, with the earliest of its first ones, int64 [n, 2]."""
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    return pairs[np.unique(pairs[:, 1], return_index=True)[1]]


def _shown_in_evaluation(samples: _Samples, trained: int) -> np.ndarray:
    """Return pairs (evaluation sample, training sample) that show the same, each training sample once, int64 [n, 2]."""
    telling = samples.features["kind"][samples.media] != BLANK  # placeholders of text-only samples leak nothing
    of_train = (samples.owners < trained) & telling
    of_evaluation = (samples.owners >= trained) & telling
    shown, first = np.unique(samples.shown[of_evaluation], return_index=True)
    if not len(shown):
        return np.zeros((0, 2), np.int64)
    place = np.minimum(np.searchsorted(shown, samples.shown[of_train]), len(shown) - 1)
    leaks = shown[place] == samples.shown[of_train]
    evaluated = samples.owners[of_evaluation][first[place[leaks]]]
    return _earliest(np.stack([evaluated, samples.owners[of_train][leaks]], axis=1))


def _describe(samples: _Samples, pairs: np.ndarray, leak: bool) -> Iterator[Match]:
    """Yield a match for each pair (other sample, training sample)."""
    media = np.array([_same_media(samples, *pair) for pair in pairs.tolist()], np.int64).reshape(-1, 2)
    known = np.flatnonzero(media[:, 0] >= 0)
    views = np.zeros(len(pairs), np.int64)
    views[known] = closest_views(samples.features, samples.media[media[known]])
    shares = in_common(samples.signatures, pairs)
    for (other, sample), view, share, (item, _) in zip(
        pairs.tolist(), views.tolist(), shares.tolist(), media.tolist(), strict=True
    ):
        yield Match(samples.place(sample), samples.place(other), leak, VIEWS[view], share, item >= 0)


def _same_media(samples: _Samples, other: int, sample: int) -> tuple[int, int]:
    """Return the first image or clip of a sample that the other one shows too, and that one; (-1, -1) without any."""
    of_sample, of_other = (
        range(samples.starts[one], samples.starts[one] + samples.counts[one]) for one in (sample, other)
    )
    shown = {int(samples.shown[item]): item for item in reversed(of_other)}
    return next(
        ((item, shown[int(samples.shown[item])]) for item in of_sample if int(samples.shown[item]) in shown), (-1, -1)
    )
