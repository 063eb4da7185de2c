"""Whether an answer is right: boxes by their overlap, everything else word for word."""

from __future__ import annotations

import json
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

MIN_OVERLAP = 0.5
"""Intersection over union from which a box counts as found (PASCAL VOC, Everingham et al. 2010)."""


def is_right(answer: str, expected: str) -> bool:
    """Return whether an answer is right.

    Where the expected answer is a box, the boxes must overlap by :data:`MIN_OVERLAP` or more; other answers must be
    equal but for white space around them.
    """
    wanted = read_box(expected)
    if wanted is None:
        return answer.strip() == expected.strip()
    found = read_box(answer)
    return found is not None and overlap(found, wanted) >= MIN_OVERLAP


def read_box(text: str) -> Box | None:
    """Return the box of an answer in Qwen's form, ``{"bbox_2d": [...], "label": ...}``; None without one."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    edges = value.get("bbox_2d") if isinstance(value, dict) else None
    if not isinstance(edges, list) or len(edges) != 4 or not all(isinstance(edge, int | float) for edge in edges):
        return None
    return edges[0], edges[1], edges[2], edges[3]


def overlap(first: Box, second: Box) -> float:
    """Return intersection over union of two boxes; 0 where one of them has no area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0 or _area(first) <= 0 or _area(second) <= 0:
        return 0.0
    return width * height / (_area(first) + _area(second) - width * height)


def guess_rate(expected: Sequence[str]) -> float:
    """Return how often a guess is right that is the answer to another sample of the same task: the chance level."""
    pairs = [(guess, answer) for i, guess in enumerate(expected) for j, answer in enumerate(expected) if i != j]
    return sum(is_right(guess, answer) for guess, answer in pairs) / len(pairs) if pairs else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
