"""Read limits of a video or image that are in the record beside it, rather than in its own object."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenvl.data.conversation.media_items import Kind, check_order, read_settings
from qwenvl.data.types import ImageItem, Message, VideoItem
from qwenvl.utils.errors import SampleError

_OF_PIXELS = ("min_pixels", "max_pixels")  # of images and videos; all others are of videos
LIMIT_FIELDS = {
    **{name: name for name in (*_OF_PIXELS, "fps", "nframes", "min_frames", "max_frames", "total_pixels")},
    **dict.fromkeys(("video_start", "start", "start_time"), "video_start"),
    **dict.fromkeys(("video_end", "end", "end_time"), "video_end"),
}
"""Names of limits in records, and their names in the objects of media."""


def with_limits(record: Mapping[str, Any], messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """Give the limits of a record to its single video, and limits of pixels to its single image or video.

    Args:
        record: Fields of the sample.
        messages: Turns of the sample.

    Returns:
        The turns, and the keys of the record that were read: none where the sample has no media that they could limit.

    Raises:
        SampleError: several items could be meant, a value is wrong, or a value differs from the item's own
            (``bad_record``).
    """
    if LIMIT_FIELDS.keys().isdisjoint(record):
        return list(messages), []
    media = [part for message in messages for part in message.parts if isinstance(part, ImageItem | VideoItem)]
    videos = [item for item in media if isinstance(item, VideoItem)]
    read, settings = list[str](), dict[str, Any]()
    for key, name in LIMIT_FIELDS.items():
        items: Sequence[ImageItem | VideoItem] = media if name in _OF_PIXELS else videos
        if record.get(key) is None or not items:
            continue
        _check_one(key, name, items, record[key])
        if name in settings:
            raise SampleError("bad_record", f"the sample has two keys that say {name!r}. Keep one of them.")
        settings[name] = record[key]
        read.append(key)
    if not read:
        return list(messages), []
    item = (videos or media)[0]
    changed = _limited(item, settings)
    parts = [tuple(changed if part is item else part for part in message.parts) for message in messages]
    return [replace(message, parts=new) for message, new in zip(messages, parts, strict=True)], read


def _check_one(key: str, name: str, items: Sequence[ImageItem | VideoItem], value: Any) -> None:
    if len(items) > 1:
        what = "videos" if all(isinstance(item, VideoItem) for item in items) else "images and videos"
        raise SampleError(
            "bad_record",
            f"the sample has {key!r} beside {len(items)} {what}. Write it into the object of the one that it limits, "
            f'such as {{"video": "a.mp4", "{name}": {reprlib.repr(value)}}}.',
        )


def _limited(item: ImageItem | VideoItem, settings: Mapping[str, Any]) -> ImageItem | VideoItem:
    """Return an item with settings of its record, which may repeat the item's own."""
    kind: Kind = "video" if isinstance(item, VideoItem) else "image"
    of_frames = isinstance(item.source, tuple)
    given = read_settings(settings, kind, of_frames)
    for name, value in given.items():
        if getattr(item, name) not in (None, value):
            reason = f"the sample says {name!r} {value}, and the object of its {kind} {getattr(item, name)}. Keep one."
            raise SampleError("bad_record", reason)
    changed = replace(item, **given)
    check_order(
        {name: value for name in LIMIT_FIELDS.values() if (value := getattr(changed, name, None)) is not None},
        of_frames,
    )
    return changed
