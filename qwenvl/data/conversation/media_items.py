"""Read the images and videos of a record in all their written forms, and bind them to tags."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from qwenvl.data.types import ImageItem, Source, VideoItem
from qwenvl.utils.errors import SampleError, nearest

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")
MEDIA_FIELDS = ("image", "images", "video", "videos")

SOURCE_KEYS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "image_url", "path", "url"),
    "video": ("video", "video_url", "frames", "path", "url"),
}
"""Keys that hold the source of an image or video, in all written forms."""
_IGNORED_KEYS = ("type", "detail")  # "detail" is a hint to OpenAI's own service
_LARGEST = 2**53  # largest number accepted: all below it are exact as floats
_FRAME_RATES = ("sample_fps", "fps", "raw_fps")  # keys for the rate of a list of frames; the first one given counts
IMG_TAG = r"<img>[^<>\n]*</img>"
"""Pattern of Qwen-VL's tag, which contains the source of its image."""
_OTHER_NAMES = re.compile(r"(image|video)_(?:paths?|files?|([0-9]+))")


class MediaPool:
    """The images and videos of a record or of one turn, bound in order to its tags.

    Args:
        fields: Fields of the sample or turn; see :func:`media_keys`.
        outer: Pool of the sample, for the tags of a turn without media of that kind of its own.

    Raises:
        SampleError: an item is not written in a form that can be read (``bad_record``).
    """

    def __init__(self, fields: Mapping[str, Any], outer: MediaPool | None = None) -> None:
        keys = media_keys(fields)
        self._items: dict[Kind, list[Any]] = {
            "image": [image_item(value) for value in _listed(fields, keys.get("image", []))],
            "video": [video_item(value) for value in _listed(fields, keys.get("video", []))],
        }
        self._tags: dict[Kind, int] = {"image": 0, "video": 0}
        self._outer = outer
        self._stands_in = False

    def bind(self, tag: str) -> ImageItem | VideoItem:
        """Return the item that ``<image>``, ``<video>`` or ``<img>a.jpg</img>`` stands for."""
        if tag.startswith("<img>"):
            return image_item(img_source(tag))
        return self.take("image" if tag == "<image>" else "video")

    def take(self, kind: Kind) -> ImageItem | VideoItem:
        """Return the next item for a tag; a stand-in past the last one, which :meth:`check_bound` reports.

        Where there are videos and no image, ``<image>`` is the tag of a video, as in LLaVA-NeXT.
        """
        if kind == "image" and not self._holds("image") and self._holds("video"):
            kind, self._stands_in = "video", True
        if self._outer is not None and not self._items[kind]:
            return self._outer.take(kind)
        number = self._tags[kind]
        self._tags[kind] += 1
        items = self._items[kind]
        stand_in = ImageItem("") if kind == "image" else VideoItem("")
        item: ImageItem | VideoItem = items[number] if number < len(items) else stand_in
        return item

    def _holds(self, kind: Kind) -> bool:
        return bool(self._items[kind]) or (self._outer is not None and self._outer._holds(kind))

    def items(self) -> tuple[ImageItem | VideoItem, ...]:
        """Return all images, then all videos."""
        return tuple(item for kind in KINDS for item in self._items[kind])

    def untouched(self) -> bool:
        """Return whether there are items, and none was bound to a tag."""
        return any(self._items.values()) and not any(self._tags.values())

    def check_bound(self, kind: Kind) -> None:
        """Raise a SampleError (``too_many_tags``, ``too_few_tags``) where the numbers of tags and items differ."""
        items, tags, tag = self._items[kind], self._tags[kind], f"<{kind}>"
        media = f"{len(items)} {kind}{'s' * (len(items) != 1)}"
        note = " (where no image is given, <image> stands for a video)" if self._stands_in else ""
        counts = f"{tags} {tag} tag{'s' * (tags != 1)} in user and tool turns{note}, {media}"
        if tags > len(items):
            raise SampleError(
                "too_many_tags",
                f"{counts}. Add what is missing to '{kind}', or take tags out; where {tag} is meant as words, "
                'write the turn as parts: [{"type": "text", "text": ...}].',
            )
        if tags < len(items):
            raise SampleError("too_few_tags", f"{counts}. {self._too_few_hint(kind)}")

    def check_bound_in(self, where: str) -> None:
        """Apply :meth:`check_bound` to all kinds of media of a turn."""
        try:
            for kind in KINDS:
                self.check_bound(kind)
        except SampleError as error:
            raise SampleError(error.category, f"{where}: {error.reason}") from error

    def _too_few_hint(self, kind: Kind) -> str:
        items, tag = self._items[kind], f"<{kind}>"
        if kind == "video" and self._tags[kind] == 1 and not any(isinstance(item.source, tuple) for item in items):
            return (
                "If these are the frames of one video, write them as a list inside the list, "
                '"video": [["a.jpg", "b.jpg"]], or as {"frames": ["a.jpg", "b.jpg"], "fps": 2}; else add tags.'
            )
        if not any(self._tags.values()):
            return f"Put {tag} where each {kind} belongs, such as '{tag}\\nWhat is this?'."
        return f"Add {tag} where each of the others belongs, or take them out of '{kind}'."


def img_source(tag: str) -> str:
    """Return the source of the image of ``<img>a.jpg</img>``."""
    return tag.removeprefix("<img>").removesuffix("</img>").strip()


def turn_pool(turn: Mapping[str, Any], where: str, outer: MediaPool) -> MediaPool:
    """Return the pool of a turn with media of its own; the pool of the sample for a turn without any."""
    if not media_keys(turn):
        return outer
    try:
        return MediaPool(turn, outer)
    except SampleError as error:
        raise SampleError(error.category, f"{where}: {error.reason}") from error


def image_item(value: Any) -> ImageItem:
    """Read one image: a string or bytes, or an object with its source and its own ``min_pixels`` and ``max_pixels``."""
    if isinstance(value, Mapping):
        source, limits = _source(value, "image"), read_settings(value, "image")
    else:
        source, limits = value, {}
    if source == b"":
        raise SampleError("zero_byte", "an embedded image is empty (0 bytes).")
    if not isinstance(source, Source) or not source:
        raise _wrong_source("an image must be a path, URL, data URI or bytes", source)
    return ImageItem(source, **limits)


def video_item(value: Any) -> VideoItem:
    """Read one video: a string, a list of frames, or an object with either and its own settings."""
    if isinstance(value, Mapping):
        source = _source(value, "video")
        limits = read_settings(value, "video", of_frames=isinstance(source, list | tuple))
    else:
        source, limits = value, {}
    if isinstance(source, list | tuple) and source:
        return VideoItem(tuple(_frame(frame) for frame in source), **limits)
    if not isinstance(source, Source) or not source:
        raise _wrong_source("a video must be a path, URL or list of frame images", source)
    return VideoItem(source, **limits)


def _wrong_source(rule: str, source: Any) -> SampleError:
    empty = " An empty cell of a table was saved as NaN: leave the key out, or write null." if source != source else ""
    return SampleError("bad_record", f"{rule}, not {_short(source)}.{empty}")


def typed_media(part: Mapping[str, Any], kind: Kind, where: str, pool: MediaPool) -> ImageItem | VideoItem:
    """Read a typed part, such as ``{"type": "image", "image": "a.jpg", "max_pixels": 50176}``.

    A part without a source of its own stands for the next item of the record's ``image`` or ``video``, like a tag.
    """
    try:
        if _source(part, kind) is None:
            item = pool.take(kind)
            return replace(item, **read_settings(part, kind, isinstance(item.source, tuple)))
        return image_item(part) if kind == "image" else video_item(part)
    except SampleError as error:
        raise SampleError(error.category, f"{where}: {error.reason}") from error


def media_keys(fields: Mapping[str, Any]) -> dict[Kind, list[str]]:
    """Return the keys of a record or turn that hold its media, in order, for each kind that it has.

    These are ``image`` or ``images``; without them, keys of other tools: ``image_path``, ``image_file`` and their
    plurals, or ``image_1``, ``image_2`` and so on (MMMU). The same for videos. Null and empty values count as absent.
    """
    found: dict[Kind, list[str]] = {}
    given = [key for key in fields if str(key).startswith(KINDS) and _is_given(fields[key])]
    for kind in KINDS if given else ():
        plain = [key for key in (kind, f"{kind}s") if key in given]
        others = [one for one in map(_OTHER_NAMES.fullmatch, given) if one and one[1] == kind]
        if plain or others:
            found[kind] = plain or [one[0] for one in sorted(others, key=lambda one: int(one[2] or 0))]
    return found


def _is_given(value: Any) -> bool:
    return value is not None and value not in ("", [])


def _listed(fields: Mapping[str, Any], keys: list[str]) -> list[Any]:
    numbered = all(key[-1].isdigit() for key in keys)
    if len(keys) > 1 and not numbered:
        raise SampleError("bad_record", f"it has both {keys[0]!r} and {keys[1]!r}. Keep one of them.")
    if numbered:
        return [fields[key] for key in keys]
    value = fields[keys[0]]
    return list(value) if isinstance(value, list) else [value]


def _frame(frame: Any) -> Source:
    item = image_item(frame)
    if item != ImageItem(item.source):
        raise SampleError("bad_record", "a frame has its own pixel limits. Give them to the whole video.")
    return item.source


def _source(fields: Mapping[str, Any], kind: Kind) -> Any:
    """Return the source of an item, as written; None where it has none."""
    content = fields.get("bytes")  # how the ``datasets`` library stores media in Arrow and Parquet
    if isinstance(content, bytes):
        return content
    given = [key for key in SOURCE_KEYS[kind] if fields.get(key) is not None]
    if len(given) > 1:
        raise SampleError("bad_record", f"an item has {' and '.join(map(repr, given))}. Keep one of them.")
    value = fields[given[0]] if given else None
    if not isinstance(value, Mapping):
        return value
    if read_settings(value, kind) or any(isinstance(inner, Mapping) for inner in value.values()):
        raise SampleError("bad_record", f"{given[0]!r} holds more than its source, such as its 'url'.")
    inner = _source(value, kind)
    return "" if inner is None else inner


def read_settings(fields: Mapping[str, Any], kind: Kind, of_frames: bool = False) -> dict[str, Any]:
    """Return an item's own settings, checked.

    Args:
        fields: Keys of the item; its source is ignored.
        kind: Kind of the item.
        of_frames: Whether the item is a list of frames.

    Raises:
        SampleError: a key is not a setting, or has a wrong value (``bad_record``).
    """
    readers = _IMAGE_SETTINGS if kind == "image" else _VIDEO_SETTINGS
    rates = _FRAME_RATES if of_frames else ()
    limits = {}
    for key, value in fields.items():
        if value is None or key in (*SOURCE_KEYS[kind], *_IGNORED_KEYS, "bytes"):
            continue
        if key not in readers and key not in rates:
            known = dict.fromkeys((*readers, *rates))
            hint = nearest(str(key)[:80], known)
            raise SampleError("bad_record", f"{_short(key)} is not a setting of {kind}s: {', '.join(known)}.{hint}")
        if key in rates and isinstance(value, str):  # "sample_fps": "1", as the examples of Qwen write it
            value = _number(value)
        limits[key] = readers.get(key, _positive)(key, value)
    for rate in [limits.pop(key) for key in reversed(rates) if key in limits]:
        limits["fps"] = rate
    check_order(limits, of_frames)
    return limits


def check_order(limits: Mapping[str, Any], of_frames: bool) -> None:
    """Refuse settings of an item that contradict each other.

    Raises:
        SampleError: two settings do (``bad_record``).
    """
    for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end")):
        if low in limits and high in limits and limits[low] > limits[high]:
            raise SampleError("bad_record", f"{low!r} {limits[low]} is above {high!r} {limits[high]}.")
    if not of_frames and "fps" in limits and "nframes" in limits:
        raise SampleError("bad_record", "a video has 'fps' and 'nframes', which contradict each other. Keep one.")


def _number(text: str) -> float | str:
    """Return a text as a number, or the text itself where it is not one."""
    try:
        return float(text)
    except ValueError:
        return text


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
        raise SampleError("bad_record", f"{key!r} must be a number above 0, not {_short(value)}.")
    return float(value)


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST or value != int(value):
        raise SampleError("bad_record", f"{key!r} must be a whole number above 0, not {_short(value)}.")
    return int(value)


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LARGEST:
        raise SampleError("bad_record", f"{key!r} must be seconds from the start, 0 or more, not {_short(value)}.")
    return float(value)


def _short(value: Any) -> str:
    return reprlib.repr(value)


_Reader = Callable[[str, Any], float]
_IMAGE_SETTINGS: dict[str, _Reader] = {"min_pixels": _whole, "max_pixels": _whole}
_VIDEO_SETTINGS: dict[str, _Reader] = {
    **_IMAGE_SETTINGS,
    "total_pixels": _whole,
    "fps": _positive,
    "nframes": _whole,
    "min_frames": _whole,
    "max_frames": _whole,
    "video_start": _seconds,
    "video_end": _seconds,
}
