"""What is counted of a row before anything is decoded: everything that packing and cost need, as whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple

import numpy as np

from qwenvl.data.media.resize import MediaPlan


class Measures(NamedTuple):
    """What is counted of one row, summed over its samples, so that those of a pack are the sums over its rows.

    Args:
        samples: usable samples; 1 for an ordinary row, more for a packed row of the official recipe, 0 for a row left
            out.
        tokens: length, placeholders of pictures included.
        trained_tokens: labels other than -100.
        patches: patches that the vision tower reads.
        tokens_squared: sum of the squared lengths of the samples: what attention costs, which never crosses them.
        patches_squared: sum of the squared patches of each picture or pair of frames, for the same reason.
        rows: Training rows; more than the samples where a conversation has several contexts.
        answers: Trained answers.
        thoughts: Trained answers with a thought.
        weighted: Trained answers with a weight other than 1.
        thinking_mismatch: samples of this kind, as the next ones: see :data:`REMARKS`.
        thoughts_left_out: samples of this kind.
        empty_answers: samples of this kind.
        unconverted: samples of this kind.
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
        """Return both together."""
        return Measures(*map(add, self, other))


MEASURES = np.dtype([(name, np.int64) for name in Measures._fields])
"""The same as a record of an array; rows add up field by field."""

NOTHING = Measures()

REMARKS = {
    "thinking_mismatch": "with a <think> block where the chat template opens none, or without the one it opens",
    "thoughts_left_out": "with thoughts in earlier answers that the chat template leaves out: these answers are "
    "trained without them, where a served thinking model begins each of its answers with a thought",
    "empty_answers": "with an empty answer, which is trained as its end of turn",
    "unconverted": "with a bbox_format and numbers, but no box or point in a form that is converted",
}
"""What is said of samples that are trained as they are: what they are samples of, by the measure that counts them."""


def count_remarks(name: str, measures: np.ndarray) -> list[str]:
    """Return a sentence for each kind of :data:`REMARKS` that some samples of a dataset are of.

    Args:
        name: registry name of the dataset.
        measures: :data:`MEASURES` of its rows, each once.
    """
    counts = {kind: int(measures[kind].sum()) for kind in REMARKS}
    return [describe_remark(name, kind, count) for kind, count in counts.items() if count]


def describe_remark(name: str, kind: str, count: int) -> str:
    """Return the sentence that counts the samples of a dataset that are of a kind of :data:`REMARKS`."""
    return f"Dataset {name!r}: {count} sample{'s' * (count != 1)} {REMARKS[kind]}."


def measure_row(tokens: int, trained_tokens: int, media: Sequence[MediaPlan]) -> Measures:
    """Count one training row of one sample."""
    grids = [plan.grid for plan in media]
    patches = sum(t * h * w for t, h, w in grids)
    return Measures(1, tokens, trained_tokens, patches, tokens**2, sum(t * (h * w) ** 2 for t, h, w in grids), 1)
