"""Integer statistics of a row, counted before anything is decoded: all that packing and cost need."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple

import numpy as np

from qwenvl.data.media.resize import MediaPlan


class Measures(NamedTuple):
    """Statistics of one row, summed over its samples; those of a pack are the sums over its rows.

    Args:
        samples: Usable samples; 1 for an ordinary row, more for a packed row of the official recipe, 0 for a row left
            out.
        tokens: Length in tokens, placeholders of images and videos included.
        trained_tokens: Labels other than -100.
        patches: Patches that the vision tower reads.
        tokens_squared: Sum of the squared lengths of the samples, the cost of attention, which never crosses them.
        patches_squared: Sum of the squared patches of each image or pair of frames, for the same reason.
        rows: Training rows; more than the samples where a conversation has several contexts.
        answers: Trained answers.
        thoughts: Trained answers with a thought.
        weighted: Trained answers with a weight other than 1.
        thinking_mismatch: Samples of this kind, like the next three: see :data:`REMARKS`.
        thoughts_left_out: Samples of this kind.
        empty_answers: Samples of this kind.
        unconverted: Samples of this kind.
    """

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    patches: int = 0
    tokens_squared: int = 0
    patches_squared: int = 0
    rows: int = 0
    answers: int = 0
    thoughts: int = 0
    weighted: int = 0
    thinking_mismatch: int = 0
    thoughts_left_out: int = 0
    empty_answers: int = 0
    unconverted: int = 0

    def plus(self, other: Measures) -> Measures:
        """Return the sums of both."""
        return Measures(*map(add, self, other))


MEASURES = np.dtype([(name, np.int64) for name in Measures._fields])
"""The same as a structured NumPy type; rows add up field by field."""

NOTHING = Measures()

REMARKS = {
    "thinking_mismatch": "with a <think> block where the chat template opens none, or without the one it opens",
    "thoughts_left_out": "with thoughts in earlier answers that the chat template leaves out: these answers are "
    "trained without them, where a served thinking model begins each of its answers with a thought",
    "empty_answers": "with an empty answer, which is trained as its end of turn",
    "unconverted": "with a bbox_format and numbers, but no box or point in a form that is converted",
}
"""Remarks on samples that are trained as they are, by the measure that counts them; they follow "N samples"."""


def count_remarks(name: str, measures: np.ndarray) -> list[str]:
    """Return a sentence for each kind of :data:`REMARKS` that a dataset has samples of.

    Args:
        name: Registry name of the dataset.
        measures: :data:`MEASURES` of its rows, each once.
    """
    counts = {kind: int(measures[kind].sum()) for kind in REMARKS}
    return [describe_remark(name, kind, count) for kind, count in counts.items() if count]


def describe_remark(name: str, kind: str, count: int) -> str:
    """Return a sentence with the number of samples in a dataset of one kind of :data:`REMARKS`."""
    return f"Dataset {name!r}: {count} sample{'s' * (count != 1)} {REMARKS[kind]}."


def measure_row(tokens: int, trained_tokens: int, media: Sequence[MediaPlan]) -> Measures:
    """Count one training row of one sample."""
    grids = [plan.grid for plan in media]
    patches = sum(t * h * w for t, h, w in grids)
    return Measures(1, tokens, trained_tokens, patches, tokens**2, sum(t * (h * w) ** 2 for t, h, w in grids), 1)
