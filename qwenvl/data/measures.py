"""What is counted of a row before anything is decoded: everything that packing and cost need, as whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple

import numpy as np

from qwenvl.data.sizes import MediaPlan


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
    """

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    patches: int = 0
    tokens_squared: int = 0
    patches_squared: int = 0

    def plus(self, other: Measures) -> Measures:
        """Return both together."""
        return Measures(*map(add, self, other))


MEASURES = np.dtype([(name, np.int64) for name in Measures._fields])
"""The same as a record of an array; rows add up field by field."""

NOTHING = Measures()


def measure_sample(tokens: int, trained_tokens: int, media: Sequence[MediaPlan]) -> Measures:
    """Count one sample."""
    grids = [plan.grid for plan in media]
    patches = sum(t * h * w for t, h, w in grids)
    return Measures(1, tokens, trained_tokens, patches, tokens**2, sum(t * (h * w) ** 2 for t, h, w in grids))
