"""Write all boxes of a sample as the family does: those in its texts, and those of ``objects`` into their tags.

A tag is filled in the family's own form (:attr:`~qwenvl.families.Family.box_text`). ms-swift offers both forms for
every family, by ``QWENVL_BBOX_FORMAT``: Qwen2-VL was trained on its ``legacy`` form, the others on its ``new`` form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenvl.data.conversation.boxes.convert import convert_boxes, convert_values
from qwenvl.data.conversation.boxes.objects import BOX_TOKENS, TAG, Objects, read_objects
from qwenvl.data.media.resize import ImagePlan, MediaPlan
from qwenvl.data.types import Conversation, Message, Sample, TextPart
from qwenvl.families import Family
from qwenvl.utils.errors import SampleError

NOTHING_CONVERTED = (
    "it has a bbox_format and numbers, and no box or point in a form that is converted (docs/data.md, Boxes)."
)
"""Remark on a sample whose conversation is :attr:`~qwenvl.data.types.Conversation.unconverted`."""


def write_boxes(
    conversation: Conversation,
    media: Sequence[MediaPlan],
    sample: Sample,
    family: Family,
    problems: list[SampleError] | None = None,
) -> Conversation:
    """Return a conversation with all its boxes as the family writes them: those in its texts, and those of ``objects``.

    Args:
        conversation: Conversation whose tags were checked (:func:`check_tags`).
        media: Plans of its images and videos, in order.
        sample: Sample of the conversation.
        family: Family of the model.
        problems: List that collects errors in boxes instead of their being raised; the conversation is then of no use.

    Raises:
        SampleError: A box cannot be converted (``bad_boxes``), or the sample's format is unknown (``bad_record``).
    """
    conversation = convert_boxes(conversation, media, sample, family, problems)
    objects = read_objects(sample.record)
    if objects is None:
        return conversation
    filler = _Filler(objects, [plan for plan in media if isinstance(plan, ImagePlan)], family, problems)
    messages = tuple(filler.fill(message) for message in conversation.messages)
    return replace(conversation, messages=messages, unconverted=conversation.unconverted and not objects.boxes)


class _Filler:
    """Fills the tags of a sample, in order.

    Args:
        objects: Contents of the tags.
        images: Images of the sample, in order.
        family: Family of the model.
        problems: See :func:`write_boxes`.
    """

    def __init__(
        self, objects: Objects, images: Sequence[ImagePlan], family: Family, problems: list[SampleError] | None
    ) -> None:
        self._bbox_type = objects.bbox_type
        self._images = images
        self._family = family
        self._problems = problems
        self._refs = iter(objects.refs)
        self._boxes = iter(zip(objects.boxes, objects.image_ids, strict=True))

    def fill(self, message: Message) -> Message:
        """Return a turn with its tags filled."""
        extra = dict(message.extra)
        if "reasoning_content" in extra:
            extra["reasoning_content"] = self._value(extra["reasoning_content"])
        parts = tuple(
            TextPart(self._value(part.text)) if isinstance(part, TextPart) else part for part in message.parts
        )
        if "tool_calls" in extra:
            extra["tool_calls"] = self._value(extra["tool_calls"])
        return replace(message, parts=parts, extra=extra)

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return TAG.sub(self._written, value)
        if isinstance(value, Mapping):
            return {key: self._value(item) for key, item in value.items()}
        return [self._value(item) for item in value] if isinstance(value, list | tuple) else value

    def _written(self, tag: re.Match[str]) -> str:
        tokens = self._family.box_text == "tokens"
        if tag[1] == "ref-object":
            ref = next(self._refs, None)
            if ref is None:  # more tags than objects, which check_tags has refused
                return tag[0]
            return f"<|object_ref_start|>{ref}<|object_ref_end|>" if tokens else ref
        box, number = next(self._boxes, (None, 0))
        if box is None:
            return tag[0]
        try:
            values = self._converted(box, number)
        except SampleError as error:
            if self._problems is None:
                raise
            self._problems.append(error)
            return ""  # the conversation is not used
        if not tokens:
            return str(values)
        points = ",".join(f"({x},{y})" for x, y in zip(values[::2], values[1::2], strict=True))
        return f"<|{BOX_TOKENS[len(box)]}_start|>{points}<|{BOX_TOKENS[len(box)]}_end|>"

    def _converted(self, box: Sequence[float], number: int) -> list[int]:
        where = f"the box {list(box)} of 'objects'"
        if number >= len(self._images):
            raise SampleError("bad_boxes", f"{where}: its image is number {number}, of {len(self._images)} (from 0).")
        counted = "pixel" if self._bbox_type == "real" else self._bbox_type
        return convert_values(box, counted, self._images[number], self._family, where)
