"""The choice of rows to show, and the statistics of their media."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qwenvl.cli.view_data.samples import Look, look_at
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.media.resize import ImagePlan, VideoPlan
from qwenvl.utils.errors import SampleError

FEWEST = 5
"""Fewest rows shown of a dataset, however small its share."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Indices of the rows, int64 [n] each, ascending, no row of a file twice.

    Args:
        shown: Rows on the page.
        counted: Rows whose media headers are read for the statistics; contains ``shown``.
    """

    shown: np.ndarray
    counted: np.ndarray


def choose(rows: ConversationDataset, left_out: np.ndarray, limit: int, most_counted: int, seed: int) -> Choice:
    """Draw rows at random from every dataset by its share, and up to the same number of left-out rows.

    Args:
        rows: Rows of the run.
        left_out: bool [rows], true for rows that training leaves out.
        limit: Most rows to show, and most left-out rows to show in addition.
        most_counted: Most rows to count.
        seed: Seed of the random draw.
    """
    tables, places = rows.locate_all()
    _, first = np.unique(np.stack([tables, places]), axis=1, return_index=True)
    order = np.random.default_rng(seed).permutation(np.sort(first))
    shown, counted = list[np.ndarray](), list[np.ndarray]()
    for table in range(len(rows.tables)):
        own = order[tables[order] == table]
        share = len(own) / len(order)
        shown.append(own[: max(round(limit * share), min(FEWEST, limit))])
        counted.append(own[: max(round(most_counted * share), len(shown[-1]))])
    problems = order[left_out[order]][:limit]
    chosen = np.unique(np.concatenate([*shown, problems]))
    return Choice(chosen, np.unique(np.concatenate([*counted, chosen])))


def look_at_rows(rows: ConversationDataset, indices: np.ndarray) -> Iterator[tuple[int, Look]]:
    """Yield (index, look) of every training row of some rows; one for a row that cannot be read."""
    for index in indices.tolist():
        try:
            samples = rows.samples(index)
        except SampleError as error:
            assert error.origin is not None, error
            yield index, Look(error.origin, None, None, ((error.category, error.reason),))
            continue
        for sample in samples:
            yield from ((index, look) for look in look_at(sample, rows.encoder))


@dataclass
class MediaStatistics:
    """Statistics of the samples of one dataset, from their media headers.

    Args:
        samples: Number of counted samples.
        turns: Number of turns of each sample.
        images: Number of images of each sample, without the frames of videos.
        pixels: Height x width after resizing, of each image and of the frames of each video.
        seconds: Length of the used range of each video, in seconds.
    """

    samples: int = 0
    turns: list[float] = field(default_factory=list)
    images: list[float] = field(default_factory=list)
    pixels: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, plan: Plan) -> None:
        """Count a sample."""
        self.samples += 1
        self.turns.append(len(plan.conversation.messages))
        self.images.append(sum(isinstance(medium, ImagePlan) for medium in plan.media))
        self.pixels += [medium.resized[0] * medium.resized[1] for medium in plan.media]
        self.seconds += [medium.num_frames / medium.fps for medium in plan.media if isinstance(medium, VideoPlan)]

    def join(self, other: MediaStatistics) -> None:
        """Add the counts of other statistics."""
        self.samples += other.samples
        for name in ("turns", "images", "pixels", "seconds"):
            getattr(self, name).extend(getattr(other, name))
