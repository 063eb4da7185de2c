"""Baseline masks that ignore the image, for comparison: a trained model has to beat all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwenvl.tasks.grounding.masks import Mask, shares
from qwenvl.tasks.grounding.metrics import MaskRecord, compare_masks

CELLS = (48, 48)
"""(height, width) of the grid on which masks of images of all sizes are averaged."""

_LEVELS = np.linspace(0.02, 0.98, 49)


@dataclass(frozen=True)
class Baselines:
    """Masks that are the same for every phrase.

    Args:
        mean: bool [48, 48], cells that a large enough share of the known masks covers.
        box: Mean bounding box (left, top, right, bottom) of the known masks, as fractions of the image's sides.
    """

    mean: np.ndarray
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, known: Sequence[Mask]) -> Baselines:
        """Fit the baselines to known masks; the threshold of the mean mask is the one that fits them best."""
        grids = np.stack([shares(mask.pixels(), CELLS) for mask in known])
        mean = grids.mean(0)
        fits = [float(np.mean([compare_masks(mean >= level, grid >= 0.5).iou for grid in grids])) for level in _LEVELS]
        boxes = np.array([_box(mask) for mask in known]).mean(0)
        return cls(mean >= _LEVELS[int(np.argmax(fits))], (boxes[0], boxes[1], boxes[2], boxes[3]))

    def compare(self, expected: Mask) -> dict[str, MaskRecord]:
        """Return the comparison of each baseline with a mask, by name."""
        height, width = expected.size
        rows = np.arange(height) * CELLS[0] // height
        columns = np.arange(width) * CELLS[1] // width
        left, top, right, bottom = self.box
        box = np.zeros(expected.size, dtype=bool)
        box[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
        pixels = expected.pixels()
        return {
            "the whole image": compare_masks(np.ones(expected.size, dtype=bool), pixels),
            "the mean box": compare_masks(box, pixels),
            "the mean mask": compare_masks(self.mean[np.ix_(rows, columns)], pixels),
        }


def _box(mask: Mask) -> tuple[float, float, float, float]:
    pixels = mask.pixels()
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    height, width = mask.size
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
