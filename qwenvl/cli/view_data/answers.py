"""Boxes in answers, and the image that each belongs to."""

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
        drawn: ``[left, top, right, bottom, text]`` of each box, by medium, in pixels of the resized image.
        left: Number of boxes whose image is unknown.
    """

    drawn: tuple[list[list[float | str]], ...]
    left: int


def find_boxes(plan: Plan, family: Family) -> FoundBoxes:
    """Return the boxes of the answers in the coordinates that the model has to write.

    A box belongs to the only medium of the sample, or else of the last turn with media before it, if it is an image.

    Args:
        plan: Plan of the sample.
        family: Family of the model.
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
        medium = None if place is None else plan.media[place]
        if place is None or not isinstance(medium, ImagePlan):
            left += len(boxes)
            continue
        drawn[place].extend(_drawn(box, medium, family) for box in boxes)
    return FoundBoxes(drawn, left)


def _boxes(text: str) -> Sequence[Box]:
    """Return the boxes of a text with a box marker; bare numbers in brackets may mean anything."""
    return read_boxes(text) if "bbox_2d" in text or "<|box_start|>" in text else []


def _drawn(box: Box, image: ImagePlan, family: Family) -> list[float | str]:
    pixels = to_pixels(box, image.resized, family, image.resized)
    return [*(round(value, 1) for value in pixels), ", ".join(f"{value:g}" for value in box)]
