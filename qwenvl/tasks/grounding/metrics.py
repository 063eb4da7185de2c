"""Metrics of masks: intersection over union, as in referring segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class MaskRecord:
    """Overlap of a predicted and an annotated mask, in pixels of the image.

    Args:
        intersection: Number of pixels in both masks.
        union: Number of pixels in either mask.
        area: Number of pixels in the annotated mask.
        pixels: Number of pixels of the image.
    """

    intersection: int
    union: int
    area: int
    pixels: int

    @property
    def iou(self) -> float:
        """Intersection over union; 1 where both are empty."""
        return self.intersection / self.union if self.union else 1.0


def compare_masks(found: np.ndarray, expected: np.ndarray) -> MaskRecord:
    """Compare a predicted with an annotated mask, both bool [height, width]."""
    both, either = np.logical_and(found, expected), np.logical_or(found, expected)
    return MaskRecord(int(both.sum()), int(either.sum()), int(expected.sum()), expected.size)


def mask_metrics(records: Sequence[MaskRecord]) -> dict[str, float]:
    """Return the metrics of masks.

    ``miou``: mean intersection over union. ``ciou``: sum of intersections over sum of unions, which gives large masks
    more weight. ``acc_at_50``: share of masks with an intersection over union of at least 0.5. ``miou_whole``: ``miou``
    of the whole image as a mask, for comparison.
    """
    if not records:
        return {}
    ious = np.array([record.iou for record in records])
    union = sum(record.union for record in records)
    return {
        "miou": float(ious.mean()),
        "ciou": sum(record.intersection for record in records) / union if union else 1.0,
        "acc_at_50": float((ious >= 0.5).mean()),
        "miou_whole": float(np.mean([record.area / record.pixels for record in records])),
    }
