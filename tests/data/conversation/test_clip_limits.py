"""Limits of a record beside its media: which item they limit, and where they are refused."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.types import ImageItem, VideoItem
from tests.data.records import ANSWER, build, reason_of

WHERE = [{"from": "human", "value": "<video>Where?"}, ANSWER]


def limited(**fields: Any) -> tuple[Any, tuple[str, ...]]:
    tags = "<image>" * len(fields.get("images", ())) + "<video>" * len(fields.get("videos", ()))
    conversation = build({**fields, "conversations": [{"from": "human", "value": f"{tags}Where?"}, ANSWER]})
    return conversation.media(), conversation.unread_keys


@pytest.mark.parametrize(
    ("limits", "own"),
    [
        ({"start": 1.5, "end": 2}, {"video_start": 1.5, "video_end": 2.0}),
        ({"start_time": 1.5, "end_time": 2}, {"video_start": 1.5, "video_end": 2.0}),
        ({"video_start": 0, "video_end": None}, {"video_start": 0.0}),
        ({"fps": 4, "min_frames": 2, "max_frames": 8, "total_pixels": 9}, {"fps": 4.0, "min_frames": 2, "max_frames": 8,
                                                                           "total_pixels": 9}),
        ({"nframes": 6, "min_pixels": 3, "max_pixels": 7}, {"nframes": 6, "min_pixels": 3, "max_pixels": 7}),
    ],
)  # fmt: skip
def test_a_single_video_gets_the_limits_of_its_record(limits: dict[str, Any], own: dict[str, Any]) -> None:
    assert limited(videos=["v.mp4"], **limits) == ((VideoItem("v.mp4", **own),), ())
    assert limited(videos=[{"video": "v.mp4"}], **limits) == limited(videos=[{"video": "v.mp4", **own}])
    typed = [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "?"}]
    conversation = build({**limits, "messages": [{"role": "user", "content": typed}, ANSWER]})
    assert (conversation.media(), conversation.unread_keys) == ((VideoItem("v.mp4", **own),), ())


def test_images_beside_a_video_are_not_limited_in_time() -> None:
    media, unread = limited(images=["a"], videos=["v"], start=1, end=2)
    assert (media, unread) == ((ImageItem("a"), VideoItem("v", video_start=1.0, video_end=2.0)), ())


def test_frames_have_the_rate_of_their_record() -> None:
    assert limited(videos=[["a", "b"]], fps=4)[0] == (VideoItem(("a", "b"), fps=4.0),)


def test_pixels_of_a_single_image() -> None:
    assert limited(images=["a"], max_pixels=9) == ((ImageItem("a", max_pixels=9),), ())


def test_where_nothing_can_be_limited_the_keys_are_named() -> None:
    assert limited(images=["a"], start=1, fps=2) == ((ImageItem("a"),), ("'fps'", "'start'"))
    assert limited(start=1, max_pixels=2) == ((), ("'max_pixels'", "'start'"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"videos": ["v", "w"], "start": 1.25}, '\'start\' beside 2 videos. Write it into the object of the one that '
                                                'it limits, such as {"video": "a.mp4", "video_start": 1.25}'),
        ({"images": ["a"], "videos": ["v"], "max_pixels": 9}, "'max_pixels' beside 2 images and videos"),
        ({"images": ["a", "b"], "max_pixels": 9}, "'max_pixels' beside 2 images"),
        ({"videos": ["v"], "start": 1, "video_start": 1}, "two keys that say 'video_start'"),
        ({"videos": ["v"], "start": "0:01"}, "'video_start' must be seconds from the start"),
        ({"videos": ["v"], "start": 2, "end": 1}, "'video_start' 2.0 is above 'video_end' 1.0"),
        ({"videos": [{"video": "v", "video_start": 3}], "end": 2}, "'video_start' 3.0 is above 'video_end' 2.0"),
        ({"videos": [{"video": "v", "video_start": 3}], "start": 2}, "the sample says 'video_start' 2.0, and"),
        ({"videos": [{"video": "v", "nframes": 3}], "fps": 2}, "'fps' and 'nframes'"),
    ],
)  # fmt: skip
def test_limits_that_fit_no_single_item_are_refused(fields: dict[str, Any], said: str) -> None:
    tags = "<image>" * len(fields.get("images", ())) + "<video>" * len(fields.get("videos", ()))
    record = {**fields, "conversations": [{"from": "human", "value": f"{tags}Where?"}, ANSWER]}
    assert said in reason_of(record, "bad_record")
