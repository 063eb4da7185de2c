"""Convert boxes and points from the coordinates of annotations to the form that a model family reads and writes.

Qwen2-VL, Qwen3-VL and Qwen3.5 write whole numbers from 0 to 1000, relative to the image (cookbooks/2d_grounding.ipynb
and cookbooks/think_with_images.ipynb of QwenLM/Qwen3-VL); Qwen2.5-VL writes pixels of the resized image
(qwen-vl-finetune/tools/process_bbox.ipynb there). With ``"bbox_format": "pixel"`` on a dataset's entry or on a sample,
annotations hold pixels of the image as it is shown (after its EXIF orientation). They are converted when the sample is
read, for the family in use and the size that the image is resized to.

Boxes are found in the text of all turns, in tool calls and in reasoning, in the written forms of
:mod:`qwenvl.data.conversation.boxes.forms`. Only their numbers change.

Numbers are rounded from exact fractions to the nearest whole number, halves to the even one. A coordinate less than one
unit outside the image, as rounded annotations have it, counts as its edge. The right and bottom edges are 1000, or the
last pixel of the resized image, as in the official converter. A box that would become empty (one pixel of an image of
4000) is made one unit wide or high.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

from qwenvl.data.conversation.boxes.forms import COUNTS, KEYS, STROKES, as_number, rewrite, rewrite_value
from qwenvl.data.media.locate import describe
from qwenvl.data.media.resize import ImagePlan, MediaPlan
from qwenvl.data.types import Conversation, Message, Sample, TextPart
from qwenvl.families import Family
from qwenvl.utils.errors import SampleError

BBOX_FORMATS = ("pixel", "relative_1000")

Box = tuple[float, float, float, float]
Size = tuple[int, int]

_RELATIVE = (1000, 1000)
_SIZES = {"relative_1000": _RELATIVE, "norm1": (1, 1)}
_SLACK = {"norm1": 0.001}
"""Distance outside its image that is allowed for a rounded coordinate, where it is not one unit."""
_DIGITS = re.compile(r"\d+")
_CONVERT_YOURSELF = (
    "Convert such boxes beforehand (tools/process_bbox.ipynb shows how), and take bbox_format away from the sample."
)


def from_coco(box: Sequence[float]) -> Box:
    """Return (x1, y1, x2, y2) in pixels of a COCO box: left, top, width, height, in pixels."""
    left, top, width, height = box
    return left, top, left + width, top + height


def from_yolo(box: Sequence[float], size: Size) -> Box:
    """Return (x1, y1, x2, y2) in pixels of a YOLO box: centre x and y, width, height, relative to the image.

    Args:
        box: Four relative numbers, 0 to 1.
        size: (height, width) of the image as it is shown.
    """
    x, y, width, height = box
    edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return edges[0] * size[1], edges[1] * size[0], edges[2] * size[1], edges[3] * size[0]


def from_voc(box: Sequence[float]) -> Box:
    """Return (x1, y1, x2, y2) in pixels of a Pascal VOC box: first and last pixel inside it, counted from 1."""
    left, top, right, bottom = box
    return left - 1, top - 1, right, bottom


def to_family(values: Sequence[float], size: Size, resized: Size, family: Family) -> list[int]:
    """Convert coordinates (x and y in turn) to the form that a family writes.

    Worked example: (320, 120) in an image of 640 x 480 pixels is (500, 250) relative to 1000; in pixels of the image
    resized to 644 x 476, it is (322, 119).

    Args:
        values: Coordinates x, y, x, y, ...; 0 to ``size``.
        size: (height, width) in the unit of ``values``: that of the image as it is shown, for pixels.
        resized: (height, width) of the resized image, in pixels.
        family: Family of the model.
    """
    written = _RELATIVE if family.boxes == "relative_1000" else resized
    last = written if family.boxes == "relative_1000" else (written[0] - 1, written[1] - 1)
    axes = _axes(values)
    exact = [Fraction(value) * written[axis] / size[axis] for value, axis in zip(values, axes, strict=True)]
    rounded = [max(0, min(round(value), last[axis])) for value, axis in zip(exact, axes, strict=True)]
    if len(rounded) == 4:
        for low, high in ((0, 2), (1, 3)):
            if rounded[low] == rounded[high] and values[low] < values[high]:
                _widen(rounded, exact, low, high, last[axes[low]])
    return rounded


def _widen(rounded: list[int], exact: Sequence[Fraction], low: int, high: int, last: int) -> None:
    """Make the empty side of a box one unit long, towards the side where more of the box lies and there is room."""
    edge = rounded[low]
    if edge < last and (exact[high] - edge >= edge - exact[low] or edge == 0):
        rounded[high] = edge + 1
    else:
        rounded[low] = max(edge - 1, 0)


def to_pixels(values: Sequence[float], resized: Size, family: Family, size: Size) -> list[float]:
    """Convert coordinates that a family writes to pixels of an image, to draw them or to compare predictions.

    Args:
        values: Coordinates x, y, x, y, ...
        resized: (height, width) of the image that the model saw.
        family: Family of the model.
        size: (height, width) of the image to draw on.
    """
    written = _RELATIVE if family.boxes == "relative_1000" else resized
    return [value * size[axis] / written[axis] for value, axis in zip(values, _axes(values), strict=True)]


def _axes(values: Sequence[float]) -> list[int]:
    """Return which of (height, width) each of x, y, x, y, ... belongs to."""
    return [1 - place % 2 for place in range(len(values))]


def bbox_format(sample: Sample) -> str | None:
    """Return the unit of a sample's coordinates: its ``bbox_format`` or its dataset's; None for that of the family.

    Raises:
        SampleError: it is not one of :data:`BBOX_FORMATS` (``bad_record``).
    """
    own = sample.record.get("bbox_format")
    value = sample.bbox_format if own is None else own
    if value is None or (isinstance(value, str) and value in BBOX_FORMATS):
        return value
    known = " or ".join(f'"{name}"' for name in BBOX_FORMATS)
    raise SampleError(
        "bad_record",
        f"bbox_format is {reprlib.repr(value)}, not {known}. Leave it out where boxes are written as the model family "
        "has them.",
    )


def convert_boxes(
    conversation: Conversation,
    media: Sequence[MediaPlan],
    sample: Sample,
    family: Family,
    problems: list[SampleError] | None = None,
) -> Conversation:
    """Return a conversation with its boxes and points as the family writes them.

    A sample with one image has its boxes in that image. With several images of one size that are resized alike, it
    makes no difference which. Otherwise every user turn must hold exactly one image, and other turns none: a box then
    lies in the image of its user turn, or of the last user turn before it.

    Args:
        conversation: Conversation of the sample.
        media: Plans of its images and videos, in order.
        sample: Sample with the ``bbox_format``.
        family: Family of the model.
        problems: List that collects errors in boxes instead of their being raised; the conversation is then of no use.

    Raises:
        SampleError: a box cannot be converted (``bad_boxes``), or the sample's format is unknown (``bad_record``).
    """
    written = bbox_format(sample)
    if written is None:
        return conversation
    found: list[str] = []
    turns = zip(conversation.messages, _images_of_turns(conversation, media), strict=True)
    messages = tuple(
        _converted(message, _Converter(written, image, family, message.role, found, problems))
        for message, image in turns
    )
    differs = written == "pixel" or family.boxes != "relative_1000"
    unconverted = differs and not found and _holds_numbers(conversation)
    return replace(conversation, messages=messages, unconverted=unconverted)


def _holds_numbers(conversation: Conversation) -> bool:
    """Return whether a conversation may hold coordinates: a turn of it has two numbers."""
    return any(len(_DIGITS.findall(f"{turn.text} {turn.extra}")) > 1 for turn in conversation.messages)


def _images_of_turns(conversation: Conversation, media: Sequence[MediaPlan]) -> list[ImagePlan | str]:
    """Return the image that the boxes of each turn lie in, or the reason why it is not known."""
    turns = conversation.messages
    images = [plan for plan in media if isinstance(plan, ImagePlan)]
    if not images or len(images) < len(media):
        why = "boxes in a sample with videos cannot be converted" if media else "the sample has no image"
        return [f"{why}. {_CONVERT_YOURSELF}"] * len(turns)
    if len({(plan.size, plan.resized) for plan in images}) == 1:
        return [images[0]] * len(turns)
    counts = [sum(not isinstance(part, TextPart) for part in turn.parts) for turn in turns]
    if any(count != (turn.role == "user") for turn, count in zip(turns, counts, strict=True)):
        why = "the images of the sample differ in size, and not every user turn holds exactly one (other turns none)"
        return [f"it is not known in which image it lies: {why}. {_CONVERT_YOURSELF}"] * len(turns)
    places = [place - 1 for place in accumulate(counts)]
    return [images[place] if place >= 0 else "it stands before the first image." for place in places]


def _converted(message: Message, converter: _Converter) -> Message:
    parts = [TextPart(converter.text(part.text)) if isinstance(part, TextPart) else part for part in message.parts]
    try:
        extra = converter.value(message.extra)
    except RecursionError as error:
        raise SampleError("bad_record", "a tool call is nested too deeply to be read.") from error
    return replace(message, parts=tuple(parts), extra=extra)


@dataclass(frozen=True, slots=True)
class _Converter:
    """Converts the boxes of one turn.

    Args:
        written: Unit of the coordinates, one of :data:`BBOX_FORMATS`.
        image: Image that the boxes lie in, or the reason why it is not known.
        family: Family of the model.
        role: Role of the turn, for messages.
        found: List that collects the kind of each box.
        problems: See :func:`convert_boxes`.
    """

    written: str
    image: ImagePlan | str
    family: Family
    role: str
    found: list[str]
    problems: list[SampleError] | None

    def text(self, text: str) -> str:
        """Convert all boxes and points of a text; nothing else of it changes."""
        return rewrite(text, self._write)

    def value(self, value: Any) -> Any:
        """Convert boxes of tool calls and reasoning: nested values whose strings are texts."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self._entry(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def _write(self, items: Sequence[str], kind: str, shown: str) -> Sequence[str]:
        return [str(value) for value in self._convert([as_number(item) for item in items], kind, shown)]

    def _entry(self, kind: Any, value: Any) -> Any:
        if kind not in KEYS or not isinstance(value, str | list | tuple):
            return self.value(value)
        if isinstance(value, str):
            return rewrite_value(value, kind, self._write)
        if any(isinstance(item, list | tuple) for item in value):
            return [self._entry(kind, item) for item in value]
        numbers = [item if isinstance(item, int | float) else None for item in value]
        return (
            self._convert(numbers, kind, f"{kind!r}: {value}")
            if any(one is not None for one in numbers)
            else self.value(value)
        )

    def _convert(self, values: Sequence[float | None], kind: str, shown: str) -> Sequence[Any]:
        """Check and convert the numbers of a box or point; None stands for a value that is not a number."""
        self.found.append(kind)
        try:
            return self._checked(values, kind, f"{shown[:200]} in a turn of the {self.role}")
        except SampleError as error:
            if self.problems is None:
                raise
            self.problems.append(error)
            return [""] * len(values)  # the conversation is not used

    def _checked(self, values: Sequence[float | None], kind: str, where: str) -> list[int]:
        numbers = [value for value in values if value is not None]
        if len(numbers) < len(values) or len(values) not in COUNTS[kind]:
            raise SampleError("bad_boxes", f"{where}: {' or '.join(map(str, COUNTS[kind]))} numbers are needed.")
        if isinstance(self.image, str):
            raise SampleError("bad_boxes", f"{where}: {self.image}")
        boxes = (numbers[:2], numbers[2:]) if kind in STROKES else (numbers,)
        return [one for box in boxes for one in convert_values(box, self.written, self.image, self.family, where)]


def convert_values(values: Sequence[float], counted: str, image: ImagePlan, family: Family, where: str) -> list[int]:
    """Convert the coordinates of a box or point, after checks.

    Args:
        values: Coordinates, x and y in turn.
        counted: Unit of the coordinates: one of :data:`BBOX_FORMATS`, or ``norm1``, 0 to 1.
        image: Image that they lie in.
        family: Family of the model.
        where: Name of the box or point, for messages.

    Raises:
        SampleError: They lie outside the image, or are not left, top, right, bottom (``bad_boxes``).
    """
    size, slack = _SIZES.get(counted, image.size), _SLACK.get(counted, 1)
    if not all(-slack < value < size[axis] + slack for value, axis in zip(values, _axes(values), strict=True)):
        raise SampleError("bad_boxes", f"{where} lies outside {_extent(counted, image)}.")
    if len(values) == 4 and not (values[0] < values[2] and values[1] < values[3]):
        raise SampleError("bad_boxes", f"{where}: x1 < x2 and y1 < y2 must hold (left, top, right, bottom).")
    return to_family(values, size, image.resized, family)


def _extent(counted: str, image: ImagePlan) -> str:
    if counted in _SIZES:
        return f"0 to {_SIZES[counted][0]}, as {counted!r} has it"
    height, width = image.size
    return f"the image {describe(image.item.source)[:200]}, which is shown {width} pixels wide and {height} high"
