"""Boxes in answers, and the picture each lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwenvl.data.conversation.boxes.convert import to_pixels
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.media.resize import ImagePlan
from qwenvl.data.types import TextPart
from qwenvl.families import Family
from qwenvl.metrics.boxes import Box, read_boxes


@dataclass(frozen=True, slots=True)
class FoundBoxes:
    """The boxes of a sample's answers.

    Args:
        drawn: for every medium, ``[left, top, right, bottom, as written]`` in pixels of the resized picture.
        left: number of boxes of which it cannot be told in which picture they lie.
    """

    drawn: tuple[list[list[float | str]], ...]
    left: int


def find_boxes(plan: Plan, family: Family) -> FoundBoxes:
    """Return the boxes of the answers as the model is to write them, after conversion to the family's convention.

    A box lies in the only medium of the sample, or of the last turn with media before it, where that is a picture.

    Args:
        plan: of the sample.
        family: of the model.
    """
    drawn = tuple(list[list[float | str]]() for _ in plan.media)
    seen, left, current = 0, 0, range(0)
    for message in plan.conversation.messages:
        count = sum(not isinstance(part, TextPart) for part in message.parts)
        if count:
            current = range(seen, seen + count)
            seen += count
        boxes = _boxes(message.text) if message.role == "assistant" else []
        place = 0 if len(plan.media) == 1 else current[0] if len(current) == 1 else None
        picture = None if place is None else plan.media[place]
        if place is None or not isinstance(picture, ImagePlan):
            left += len(boxes)
            continue
        drawn[place].extend(_drawn(box, picture, family) for box in boxes)
    return FoundBoxes(drawn, left)


def _boxes(text: str) -> Sequence[Box]:
    """Return the boxes of a text that says that they are some; two points in brackets alone may be anything."""
    return read_boxes(text) if "bbox_2d" in text or "<|box_start|>" in text else []


def _drawn(box: Box, picture: ImagePlan, family: Family) -> list[float | str]:
    pixels = to_pixels(box, picture.resized, family, picture.resized)
    return [*(round(value, 1) for value in pixels), ", ".join(f"{value:g}" for value in box)]
