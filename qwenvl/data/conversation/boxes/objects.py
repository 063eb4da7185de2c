"""Read ms-swift's grounding format: ``objects`` of a record, and the tags ``<ref-object>`` and ``<bbox>`` they fill.

``objects`` holds ``ref`` (texts), ``bbox`` (lists of x, y, x, y, ...), ``bbox_type`` (``real``: pixels of the image as
it is shown; ``norm1``: 0 to 1) and ``image_id`` (for each box, the number of its image, from 0; without it the first
one). Tags are filled in order over all turns, texts and boxes separately (ms-swift, Custom-dataset, Grounding), by
:mod:`qwenvl.data.conversation.boxes.write`, once the sizes of the images are known.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl.data.types import Message
from qwenvl.utils.errors import SampleError

BBOX_TYPES = ("real", "norm1")

_KEYS = ("ref", "bbox", "bbox_type", "image_id")
TAG = re.compile("<(ref-object|bbox)>")
BOX_TOKENS = {2: "box", 4: "box", 8: "quad"}
"""Special tokens around a box, by the number of its coordinates."""
_EXAMPLE = '"objects": {"ref": ["red square"], "bbox": [[100, 75, 200, 150]]}'


@dataclass(frozen=True, slots=True)
class Objects:
    """Contents of the tags of a record.

    Args:
        refs: Texts, for ``<ref-object>``.
        boxes: Coordinates of each box, x and y in turn, for ``<bbox>``.
        bbox_type: One of :data:`BBOX_TYPES`.
        image_ids: Number of the image of each box among the images of the sample, from 0.
    """

    refs: tuple[str, ...]
    boxes: tuple[tuple[float, ...], ...]
    bbox_type: str
    image_ids: tuple[int, ...]


def read_objects(record: Mapping[str, Any]) -> Objects | None:
    """Return the objects of a record; None without any, or where they are not of ms-swift's form.

    Raises:
        SampleError: They are of that form, and something in them cannot be used (``bad_record``).
    """
    given = record.get("objects")
    if given is None or not _is_of_this_form(given):
        return None
    refs, boxes = _listed(given, "ref"), _listed(given, "bbox")
    if not all(isinstance(ref, str) for ref in refs):
        raise _bad(f"'ref' must be a list of texts, not {reprlib.repr(refs)}.")
    for box in boxes:
        if not isinstance(box, list | tuple) or len(box) not in BOX_TOKENS or not all(map(_is_number, box)):
            raise _bad(f"a box is 2, 4 or 8 numbers, x and y by turns, not {reprlib.repr(box)}.")
    bbox_type = "real" if given.get("bbox_type") is None else given["bbox_type"]
    if bbox_type not in BBOX_TYPES:
        raise _bad(f'\'bbox_type\' must be "real" (pixels) or "norm1" (0 to 1), not {reprlib.repr(bbox_type)}.')
    image_ids = _listed(given, "image_id") or [0] * len(boxes)
    if len(image_ids) != len(boxes) or not all(type(number) is int and number >= 0 for number in image_ids):
        raise _bad(f"'image_id' must be one whole number from 0 for each of the {len(boxes)} boxes, not {image_ids}.")
    return Objects(tuple(refs), tuple(map(tuple, boxes)), bbox_type, tuple(image_ids))


def _is_of_this_form(value: Any) -> bool:
    keys: set[Any] = {key for key in value if value[key] is not None} if isinstance(value, Mapping) else set()
    return bool(keys & {"ref", "bbox"}) and keys <= set(_KEYS)


def _listed(objects: Mapping[str, Any], key: str) -> list[Any]:
    value = [] if objects.get(key) is None else objects[key]
    if not isinstance(value, list | tuple):
        raise _bad(f"{key!r} must be a list, not {type(value).__name__}.")
    return list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bad(what: str) -> SampleError:
    return SampleError("bad_record", f"'objects': {what}")


def check_tags(record: Mapping[str, Any], written: Sequence[Any], messages: Sequence[Message]) -> None:
    """Check that there are as many tags as objects.

    Without objects, a tag in the text of a turn is an error: it would be trained as a word. In a typed text part, a tag
    is plain text, like media tags; so is an element such as ``<bbox>1 2 3 4</bbox>``.

    Args:
        record: Record of the sample.
        written: Its turns as written.
        messages: The same turns read, with the system turn.

    Raises:
        SampleError: Tags are more or fewer than objects (``bad_record``).
    """
    objects = read_objects(record)
    if objects is None:
        _refuse_tags(record, written)
        return
    tags = [tag for message in messages for text in _texts(message) for tag in TAG.findall(text)]
    for tag, key, items in (("ref-object", "ref", objects.refs), ("bbox", "bbox", objects.boxes)):
        if tags.count(tag) != len(items):
            raise _bad(
                f"{tags.count(tag)} <{tag}> tags in the turns, {len(items)} in '{key}'. They are filled in order: "
                "there must be as many."
            )


def _refuse_tags(record: Mapping[str, Any], written: Sequence[Any]) -> None:
    contents = [turn.get(key) for turn in written if isinstance(turn, Mapping) for key in ("value", "content")]
    for text in [text for text in (*contents, record.get("system")) if isinstance(text, str)]:
        tag = TAG.search(text)
        if tag and f"</{tag[1]}>" not in text:
            given = "" if record.get("objects") is None else f" Its 'objects' are not of that form: {_EXAMPLE}."
            raise SampleError(
                "bad_record",
                f"a turn has {tag[0]}, which 'objects' of the record fill, and there are none.{given} Add them; "
                'where the tag is meant as words, write the turn as parts: [{"type": "text", "text": ...}].',
            )


def _texts(message: Message) -> Iterator[str]:
    """Yield all texts of a turn in the order that they are rendered in."""
    for value in (message.extra.get("reasoning_content"), message.text, message.extra.get("tool_calls")):
        yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
