"""How well masks fit: intersection over union, as referring segmentation counts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class MaskRecord:
    """What is kept of one predicted mask, in pixels of the picture.

    Args:
        intersection: in both masks.
        union: in one of them or both.
        area: in the annotated one.
        pixels: of the picture.
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
    """Compare two masks: bool [height, width] both."""
    both, either = np.logical_and(found, expected), np.logical_or(found, expected)
    return MaskRecord(int(both.sum()), int(either.sum()), int(expected.sum()), expected.size)


def mask_metrics(records: Sequence[MaskRecord]) -> dict[str, float]:
    """Return the figures of masks.

    ``miou``: mean of their intersections over unions. ``ciou``: all intersections over all unions, in which large masks
    count more. ``acc_at_50``: the share of masks with an intersection over union of at least a half. ``miou_whole``:
    the mean if the whole picture were the mask each time, to compare with.
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
