"""What is counted of a row before anything is decoded: everything that packing and cost need, as whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwenvl.data.sizes import MediaPlan

MEASURES = np.dtype(
    [
        ("samples", np.int64),
        ("tokens", np.int64),
        ("trained_tokens", np.int64),
        ("patches", np.int64),
        ("tokens_squared", np.int64),
        ("patches_squared", np.int64),
    ]
)
"""One record a row, each field summed over the row's samples, so that the record of a pack is the sum of its rows'.

``samples``: usable samples; 1 for an ordinary row, more for a packed row of the official recipe, 0 for a row left out.
``tokens``: length, placeholders of pictures included. ``trained_tokens``: labels other than -100. ``patches``: patches
that the vision tower reads. ``tokens_squared``: sum of the squared lengths of the samples, and ``patches_squared``: sum
of the squared patches of each picture or pair of frames: what attention costs, which never crosses those borders.
"""


def measure_sample(tokens: int, trained_tokens: int, media: Sequence[MediaPlan]) -> tuple[int, ...]:
    """Return the record of one sample, in the order of :data:`MEASURES`."""
    grids = [plan.grid for plan in media]
    patches = sum(t * h * w for t, h, w in grids)
    return 1, tokens, trained_tokens, patches, tokens * tokens, sum(t * (h * w) ** 2 for t, h, w in grids)
