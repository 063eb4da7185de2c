"""Media of a record: every form they are given in, and what each tag is bound to."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.types import ImageItem, TextPart, VideoItem
from tests.data.records import ask, reason_of_question


def test_images_and_videos_are_bound_in_order() -> None:
    message = ask("<video><image> x <image><video>", images=["a", "b"], videos=["v", ["f1", "f2"]])
    assert message.parts == (
        VideoItem("v"),
        ImageItem("a"),
        TextPart("x"),
        ImageItem("b"),
        VideoItem(("f1", "f2")),
    )


@pytest.mark.parametrize(
    ("value", "item"),
    [
        ("a.jpg", ImageItem("a.jpg")),
        ({"image": "a.jpg", "max_pixels": 50176, "min_pixels": None}, ImageItem("a.jpg", max_pixels=50176)),
        ({"path": "a.jpg", "min_pixels": 784.0}, ImageItem("a.jpg", min_pixels=784)),
        (b"\x01\x02", ImageItem(b"\x01\x02")),
        ({"bytes": b"\x01\x02", "path": "a.jpg"}, ImageItem(b"\x01\x02")),
        ({"bytes": None, "path": "a.jpg"}, ImageItem("a.jpg")),
        ({"image": {"bytes": b"\x01\x02", "path": None}, "max_pixels": 9}, ImageItem(b"\x01\x02", max_pixels=9)),
        ({"image_url": {"url": "http://x/a.jpg", "detail": "high"}}, ImageItem("http://x/a.jpg")),
    ],
)
def test_forms_of_an_image(value: Any, item: ImageItem) -> None:
    assert ask("<image>", image=value).parts == (item,)
    assert ask("<image>", image=[value]).parts == (item,)


@pytest.mark.parametrize(
    ("value", "item"),
    [
        ("v.mp4", VideoItem("v.mp4")),
        ([["a", "b"]], VideoItem(("a", "b"))),
        ({"video": ["a", "b"], "fps": 2}, VideoItem(("a", "b"), fps=2.0)),
        ({"frames": ["a", {"path": "b"}], "fps": 4}, VideoItem(("a", "b"), fps=4.0)),
        ([[b"1", {"bytes": b"2", "path": None}]], VideoItem((b"1", b"2"))),
        ({"bytes": b"1", "path": "v.mp4"}, VideoItem(b"1")),
        ({"video": ["a"], "raw_fps": 30}, VideoItem(("a",), fps=30.0)),
        ({"video": ["a"], "raw_fps": 30, "fps": 5, "sample_fps": 2}, VideoItem(("a",), fps=2.0)),
        ({"video": "v.mp4", "nframes": 8, "video_start": 0, "video_end": 2.5},
         VideoItem("v.mp4", nframes=8, video_start=0.0, video_end=2.5)),
        ({"video": "v.mp4", "fps": 1.5, "min_frames": 4, "max_frames": 8, "min_pixels": 1, "max_pixels": 9},
         VideoItem("v.mp4", fps=1.5, min_frames=4, max_frames=8, min_pixels=1, max_pixels=9)),
        ({"video": "v.mp4", "min_frames": 4, "max_frames": 4, "min_pixels": 9, "max_pixels": 9},
         VideoItem("v.mp4", min_frames=4, max_frames=4, min_pixels=9, max_pixels=9)),
    ],
)  # fmt: skip
def test_forms_of_a_video(value: Any, item: VideoItem) -> None:
    assert ask("<video>", video=value).parts == (item,)
    if isinstance(value, dict):
        assert ask([{"type": "video", **value}]).parts == (item,)
        assert ask("<video>", videos=[value]).parts == (item,)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_pixels": 10, "max_pixels": 9}, "'min_pixels' 10 is above 'max_pixels' 9"),
        ({"min_frames": 5, "max_frames": 4}, "'min_frames' 5 is above 'max_frames' 4"),
        ({"video_start": 2, "video_end": 1}, "'video_start' 2.0 is above 'video_end' 1.0"),
        ({"fps": 1, "nframes": 4}, "'fps' and 'nframes', which contradict each other"),
        ({"fps": 0}, "'fps' must be a number above 0, not 0"),
        ({"fps": True}, "'fps' must be a number above 0, not True"),
        ({"fps": "2"}, "'fps' must be a number above 0, not '2'"),
        ({"fps": 2**53}, "'fps' must be a number above 0, not 9007199254740992"),
        ({"nframes": "2"}, "'nframes' must be a whole number above 0, not '2'"),
        ({"nframes": True}, "'nframes' must be a whole number above 0, not True"),
        ({"video_end": 2**53}, "'video_end' must be seconds from the start, 0 or more"),
        ({"video_end": "2"}, "'video_end' must be seconds from the start, 0 or more, not '2'"),
        ({"raw_fps": 30}, "'raw_fps' is not a setting of videos: min_pixels, "),  # it is one of a list of frames
        ({"nframes": 2.5}, "'nframes' must be a whole number above 0, not 2.5"),
        ({"nframes": 2**53}, "'nframes' must be a whole number above 0"),
        ({"video_start": -1}, "'video_start' must be seconds from the start, 0 or more, not -1"),
        ({"min_pixel": 9}, "'min_pixel' is not a setting of videos"),
    ],
)
def test_settings_that_contradict_or_cannot_be_are_refused(limits: dict[str, Any], said: str) -> None:
    assert said in reason_of_question("<video>", "bad_record", video={"video": "v.mp4", **limits})


def test_settings_of_videos_are_none_of_images() -> None:
    reason = reason_of_question("<image>", "bad_record", image={"image": "a.jpg", "sample_fps": 2})
    assert "'sample_fps' is not a setting of images: min_pixels, max_pixels." in reason


def test_a_record_has_its_media_under_one_name() -> None:
    reason = reason_of_question("<image>", "bad_record", image="a.jpg", images=["a.jpg"])
    assert "has both 'image' and 'images'. Keep one of them" in reason
    assert ask("<image>", image="a.jpg", images=[]).parts == ask("<image>", image="", images="a.jpg").parts


def test_an_empty_picture_is_said_to_be_empty() -> None:
    assert "0 bytes" in reason_of_question("<image>", "zero_byte", image={"bytes": b"", "path": "a.jpg"})


def test_typed_parts() -> None:
    message = ask(
        [
            {"type": "image", "image": "a.jpg", "text": None, "max_pixels": 100},
            {"type": "text", "text": "\n and "},
            {"type": "image_url", "image_url": {"url": "http://x/b.jpg"}},
            {"type": "image_url", "image_url": "c.jpg"},
            {"type": "video_url", "video_url": {"url": "v.mp4"}, "fps": 1},
            {"type": "text", "text": ""},
        ]
    )
    assert message.parts == (
        ImageItem("a.jpg", max_pixels=100),
        TextPart("\n and "),
        ImageItem("http://x/b.jpg"),
        ImageItem("c.jpg"),
        VideoItem("v.mp4", fps=1.0),
    )


def test_typed_parts_without_a_source_stand_for_the_records_media() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "image": None, "max_pixels": 9}]
    assert ask(parts, images=["a", "b"]).parts == (ImageItem("a"), TextPart("or"), ImageItem("b", max_pixels=9))
    assert "1 image" in reason_of_question(parts, "too_many_tags", images=["a"])


def test_counts_of_tags_and_media_are_told() -> None:
    reason = reason_of_question("<image> or <image>?", "too_many_tags", image="a.jpg")
    assert "2 <image> tags" in reason and "1 image" in reason
    assert "3 images" in reason_of_question("<image>", "too_few_tags", images=["a", "b", "c"])
    assert "Put <image> where" in reason_of_question("what is this?", "too_few_tags", image="a.jpg")
    assert "0 videos" in reason_of_question("<video>", "too_many_tags", image=None)
    nested = reason_of_question("<video>", "too_few_tags", video=["a.jpg", "b.jpg"])
    assert '[["a.jpg", "b.jpg"]]' in nested and '"frames"' in nested
    assert "frames" not in reason_of_question("<video>", "too_few_tags", video=[["a", "b"], ["c"]])
