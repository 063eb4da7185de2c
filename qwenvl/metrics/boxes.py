"""Boxes in answers, scored by their overlap with the expected ones.

Boxes are matched one to one with the largest total overlap (the Hungarian method, by
``scipy.optimize.linear_sum_assignment``); labels are not compared. Each missing or superfluous box counts as a miss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from qwenvl.data.conversation.boxes.forms import read
from qwenvl.metrics.base import Case, Metric, Scored

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

MIN_OVERLAP = 0.5
"""Intersection over union from which a box counts as found (PASCAL VOC, Everingham et al. 2010)."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_LIST = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_POINTS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")


def read_boxes(text: str, *, bare: bool = False) -> list[Box]:
    """Return the boxes of an answer in the forms that training converts, in order; nothing where there are none.

    Those of four numbers in :mod:`qwenvl.data.conversation.boxes.forms`, such as ``{"bbox_2d": [x1, y1, x2, y2]}``
    alone, in lists or fenced, also where the JSON around it is cut short; or else ``(x1,y1),(x2,y2)``, which decoding
    leaves of ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``.

    Args:
        text: Answer.
        bare: Whether to read bare ``[x1, y1, x2, y2]`` too. It is ambiguous unless the question asks for boxes.
    """
    written = [numbers for numbers in read(text) if len(numbers) == 4]
    found = written or _POINTS.findall(text) or (_LIST.findall(text) if bare else [])
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in found]


def overlap(first: Box, second: Box) -> float:
    """Return intersection over union of two boxes; 0 where one of them has no area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0 or _area(first) <= 0 or _area(second) <= 0:
        return 0.0
    return width * height / (_area(first) + _area(second) - width * height)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def matched_overlaps(found: Sequence[Box], wanted: Sequence[Box]) -> list[float]:
    """Return the overlap of each pair of the best one-to-one matching; 0 for each unmatched box."""
    table = np.array([[overlap(one, other) for other in wanted] for one in found]).reshape(len(found), len(wanted))
    rows, columns = linear_sum_assignment(table, maximize=True)
    return [*table[rows, columns].tolist(), *[0.0] * abs(len(found) - len(wanted))]


def _best_overlaps(case: Case) -> tuple[list[float], bool]:
    found = read_boxes(case.prediction, bare=True)
    choices = [matched_overlaps(found, read_boxes(expected, bare=True)) for expected in case.expected]
    return max(choices, key=lambda overlaps: sum(overlaps) / max(len(overlaps), 1)), bool(found)


def _iou(case: Case) -> Scored:
    overlaps, readable = _best_overlaps(case)
    return Scored(sum(overlaps) / len(overlaps) if overlaps else 0.0, readable)


def _accuracy(case: Case) -> Scored:
    overlaps, readable = _best_overlaps(case)
    hits = sum(one >= MIN_OVERLAP for one in overlaps)
    return Scored(hits / len(overlaps) if overlaps else 0.0, readable)


BOX_IOU = Metric("box_iou", "box IoU", "mean overlap of matched boxes, misses as 0", _iou)
BOX_ACCURACY = Metric(
    "box_accuracy", "box accuracy at 0.5", "share of boxes that overlap by half (PASCAL VOC, RefCOCO)", _accuracy
)
