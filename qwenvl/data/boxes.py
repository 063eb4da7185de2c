"""Boxes and points: from the coordinates that annotations hold to those that a model family reads and writes.

Qwen2-VL, Qwen3-VL and Qwen3.5 write whole numbers from 0 to 1000, relative to the picture (cookbooks/2d_grounding.ipynb
and cookbooks/think_with_images.ipynb of QwenLM/Qwen3-VL); Qwen2.5-VL writes pixels of the picture after resizing
(qwen-vl-finetune/tools/process_bbox.ipynb there). With ``"bbox_format": "pixel"`` on a dataset's entry or on a sample,
annotations hold pixels of the picture as it is shown, and are converted when the sample is read: after its EXIF
orientation, for the family in use, and at the size the picture is resized to.

Written forms that are found in the text of all turns, and in tool calls and reasoning:

- ``"bbox_2d": [x1, y1, x2, y2]`` and ``"point_2d": [x, y]``, in any JSON, fenced or not, on one line or many;
- ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>`` and the four points of ``<|quad_start|>...<|quad_end|>``.

Only their numbers change. A list without any number, such as ``[x1, y1, x2, y2]`` in an instruction, is left alone.

Rounding: to the nearest whole number, halves to the even one, from exact fractions. A coordinate less than one unit
outside the picture, as rounded annotations have it, counts as its edge. The right and bottom edges are 1000, or the
last pixel of the resized picture, as in the official converter. A box that would become empty (one pixel of a picture
of 4000) is one unit wide or high.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

from qwenvl.data.media_sources import describe
from qwenvl.data.sizes import ImagePlan, MediaPlan
from qwenvl.data.types import Conversation, Message, Sample, TextPart
from qwenvl.utilities.errors import SampleError
from qwenvl.utilities.families import Family

BBOX_FORMATS = ("pixel", "relative_1000")

Box = tuple[float, float, float, float]
Size = tuple[int, int]

_RELATIVE = (1000, 1000)
_COUNTS = {"bbox_2d": 4, "point_2d": 2, "box": 4, "quad": 8}
_KEYS = ("bbox_2d", "point_2d")
# JSON inside a JSON string has its quotes escaped, once or more. Repetitions have an end, since each start of one would
# otherwise be followed to the end of the text.
_WRITTEN = re.compile(
    r"""["'](?P<key>bbox_2d|point_2d)\\{0,99}["']\s{0,99}:\s{0,99}\[(?P<list>[^\]]{0,999})"""
    r"""|<\|(?P<token>box|quad)_start\|>(?P<points>.{0,999}?)<\|(?P=token)_end\|>""",
    re.DOTALL,
)
_ITEM = re.compile(r"[^\s,()]+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")
_CONVERT_YOURSELF = (
    "Convert such boxes beforehand (tools/process_bbox.ipynb shows how), and take bbox_format away from the sample."
)


def from_coco(box: Sequence[float]) -> Box:
    """Return (x1, y1, x2, y2) in pixels of a COCO box: left, top, width, height, in pixels."""
    left, top, width, height = box
    return left, top, left + width, top + height


def from_yolo(box: Sequence[float], size: Size) -> Box:
    """Return (x1, y1, x2, y2) in pixels of a YOLO box: centre x and y, width, height, as shares of the picture.

    Args:
        box: the four shares, 0 to 1.
        size: (height, width) of the picture as it is shown.
    """
    x, y, width, height = box
    edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return edges[0] * size[1], edges[1] * size[0], edges[2] * size[1], edges[3] * size[0]


def from_voc(box: Sequence[float]) -> Box:
    """Return (x1, y1, x2, y2) in pixels of a Pascal VOC box: first and last pixel inside it, counted from 1."""
    left, top, right, bottom = box
    return left - 1, top - 1, right, bottom


def to_family(values: Sequence[float], size: Size, resized: Size, family: Family) -> list[int]:
    """Convert coordinates, x and y by turns, to those that a family writes.

    Worked example: (320, 120) in a picture of 640 x 480 pixels is (500, 250) relative to 1000; where the picture is
    resized to 644 x 476, it is (322, 119) in its pixels.

    Args:
        values: x, y, x, y, ...; 0 to ``size``.
        size: (height, width) that ``values`` count: of the picture as it is shown, for its pixels.
        resized: (height, width) of the picture after resizing.
        family: of the model.
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
    """Make the empty side of a box one unit long, to the side on which more of it lies and there is room."""
    edge = rounded[low]
    if edge < last and (exact[high] - edge >= edge - exact[low] or edge == 0):
        rounded[high] = edge + 1
    else:
        rounded[low] = max(edge - 1, 0)


def to_pixels(values: Sequence[float], resized: Size, family: Family, size: Size) -> list[float]:
    """Convert coordinates that a family writes to pixels of a picture, to draw them or to compare predictions.

    Args:
        values: x, y, x, y, ...
        resized: (height, width) that the model saw.
        family: of the model.
        size: (height, width) of the picture to draw on.
    """
    written = _RELATIVE if family.boxes == "relative_1000" else resized
    return [value * size[axis] / written[axis] for value, axis in zip(values, _axes(values), strict=True)]


def _axes(values: Sequence[float]) -> list[int]:
    """Return which of (height, width) each of x, y, x, y, ... belongs to."""
    return [1 - place % 2 for place in range(len(values))]


def bbox_format(sample: Sample) -> str | None:
    """Return what the coordinates of a sample count: its own ``bbox_format``, or its dataset's; None: the family's own.

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

    They lie in the only picture of the sample. With several pictures, all of one size and resized alike, it makes no
    difference which. Otherwise every user turn must hold exactly one picture, and other turns none: a box then lies in
    the picture of its user turn, or of the last one before it.

    Args:
        conversation: of the sample.
        media: what becomes of its pictures and videos, in order.
        sample: says what its coordinates count.
        family: of the model.
        problems: where given, what is wrong with boxes is added to it instead of being raised; the conversation
            is of no use then.

    Raises:
        SampleError: a box cannot be converted (``bad_boxes``), or the sample's format is unknown (``bad_record``).
    """
    written = bbox_format(sample)
    if written is None:
        return conversation
    pictures = _pictures(conversation, media)
    turns = zip(conversation.messages, pictures, strict=True)
    messages = [
        _converted(message, _Converter(written, picture, family, message.role, problems)) for message, picture in turns
    ]
    return replace(conversation, messages=tuple(messages))


def _pictures(conversation: Conversation, media: Sequence[MediaPlan]) -> list[ImagePlan | str]:
    """Return the picture that the boxes of each turn lie in, or why there is none."""
    turns = conversation.messages
    images = [plan for plan in media if isinstance(plan, ImagePlan)]
    if not images or len(images) < len(media):
        why = "boxes in a sample with videos cannot be converted" if media else "the sample has no picture"
        return [f"{why}. {_CONVERT_YOURSELF}"] * len(turns)
    if len({(plan.size, plan.resized) for plan in images}) == 1:
        return [images[0]] * len(turns)
    counts = [sum(not isinstance(part, TextPart) for part in turn.parts) for turn in turns]
    if any(count != (turn.role == "user") for turn, count in zip(turns, counts, strict=True)):
        why = "the pictures of the sample differ in size, and not every user turn holds exactly one (other turns none)"
        return [f"it cannot be told in which picture it lies: {why}. {_CONVERT_YOURSELF}"] * len(turns)
    places = [place - 1 for place in accumulate(counts)]
    return [images[place] if place >= 0 else "it stands before the first picture." for place in places]


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
        written: what they count, one of :data:`BBOX_FORMATS`.
        picture: that they lie in, or why there is none.
        family: of the model.
        role: whose turn it is, for messages.
        problems: see :func:`convert_boxes`.
    """

    written: str
    picture: ImagePlan | str
    family: Family
    role: str
    problems: list[SampleError] | None

    def text(self, text: str) -> str:
        """Convert all boxes and points of a text; nothing else of it changes."""
        return _WRITTEN.sub(self._match, text)

    def value(self, value: Any) -> Any:
        """Convert those of tool calls and reasoning: nested values, whose strings are texts."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self._entry(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def _match(self, match: re.Match[str]) -> str:
        group = "list" if match["key"] else "points"
        items = _ITEM.findall(match[group])
        numbers = [float(item) for item in items if _NUMBER.fullmatch(item)]
        if not numbers:
            return match[0]
        shown = match[0] + ("]" if match["key"] else "")
        converted = iter(self._convert(numbers, len(items), match["key"] or match["token"], shown))
        start, end = match.start(group) - match.start(), match.end(group) - match.start()
        return match[0][:start] + _ITEM.sub(lambda _: str(next(converted)), match[group]) + match[0][end:]

    def _entry(self, kind: Any, value: Any) -> Any:
        items = value if kind in _KEYS and isinstance(value, list | tuple) else ()
        numbers = [item for item in items if isinstance(item, int | float)]
        return self._convert(numbers, len(items), kind, f"{kind!r}: {value}") if numbers else self.value(value)

    def _convert(self, values: Sequence[float], items: int, kind: str, shown: str) -> list[Any]:
        """Return the numbers of a box or point converted, after checks; ``items`` are the numbers and all else."""
        try:
            return self._checked(values, items, kind, shown)
        except SampleError as error:
            if self.problems is None:
                raise
            self.problems.append(error)
            return [""] * items  # of a conversation that nobody uses

    def _checked(self, values: Sequence[float], items: int, kind: str, shown: str) -> list[int]:
        where = f"{shown[:200]} in a turn of the {self.role}"
        if len(values) < items or items != _COUNTS[kind]:
            raise SampleError("bad_boxes", f"{where}: {_COUNTS[kind]} numbers are needed.")
        if isinstance(self.picture, str):
            raise SampleError("bad_boxes", f"{where}: {self.picture}")
        size = self.picture.size if self.written == "pixel" else _RELATIVE
        if not all(-1 < value < size[axis] + 1 for value, axis in zip(values, _axes(values), strict=True)):
            raise SampleError("bad_boxes", f"{where} lies outside {self._extent(self.picture)}.")
        if items == 4 and not (values[0] < values[2] and values[1] < values[3]):
            raise SampleError("bad_boxes", f"{where}: x1 < x2 and y1 < y2 must hold (left, top, right, bottom).")
        return to_family(values, size, self.picture.resized, self.family)

    def _extent(self, picture: ImagePlan) -> str:
        if self.written != "pixel":
            return f"0 to 1000, as bbox_format {self.written!r} has it"
        height, width = picture.size
        name = describe(picture.item.source)[:200]
        return f"the picture {name}, which is shown {width} pixels wide and {height} high"
