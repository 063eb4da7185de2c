"""Media of a record: every form they are given in, and what each tag is bound to."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.types import ImageItem, TextPart, VideoItem
from tests.data.records import ANSWER, ask, build, reason_of, reason_of_question


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


def test_the_tag_of_qwen_vl_says_itself_which_image_it_is() -> None:
    message = ask("Picture 1: <img>a.jpg</img>\nPicture 2: <img> b c.png </img>\nSame?")
    images = ImageItem("a.jpg"), ImageItem("b c.png")
    assert message.parts == (TextPart("Picture 1:"), images[0], TextPart("Picture 2:"), images[1], TextPart("Same?"))
    assert ask("<image><img>b</img>", image="a").parts == (ImageItem("a"), ImageItem("b"))
    for words in ("<img>", '<img src="a.jpg">', "<img>a\n</img>", "<img><b></img>"):
        assert ask(words).parts == (TextPart(words),)
    conversation = build({"conversations": [{"from": "system", "value": "<img>a</img>"}, ANSWER]})
    assert conversation.media() == ()
    assert "an image must be" in reason_of_question("<img></img>", "bad_record")


@pytest.mark.parametrize(
    ("fields", "sources"),
    [
        ({"image_path": "a"}, ["a"]),
        ({"image_paths": ["a", "b"]}, ["a", "b"]),
        ({"image_file": "a", "images": []}, ["a"]),
        ({"image_2": "b", "image_10": "c", "image_1": "a", "image_3": None}, ["a", "b", "c"]),
        ({"image_1": {"path": "a", "max_pixels": None}}, ["a"]),
        ({"video_path": "v"}, ["v"]),
        ({"video_1": ["f1", "f2"], "image_1": "a"}, [("f1", "f2"), "a"]),
    ],
)
def test_keys_of_others_hold_media(fields: dict[str, Any], sources: list[Any]) -> None:
    tags = "".join("<video>" if isinstance(one, tuple) or one == "v" else "<image>" for one in sources)
    conversation = build({**fields, "conversations": [{"from": "human", "value": tags + "?"}, ANSWER]})
    assert [item.source for item in conversation.media()] == sources
    assert conversation.unread_keys == ()


def test_keys_of_others_beside_the_plain_one_are_named() -> None:
    turns = [{"from": "human", "value": "<image>"}, ANSWER]
    conversation = build({"image": "a", "image_path": "b", "image_1": "c", "conversations": turns})
    assert conversation.media() == (ImageItem("a"),)
    assert conversation.unread_keys == ("'image_1'", "'image_path'")
    for other in ({"image_1": "b"}, {"image_file": "b"}):
        reason = reason_of({"image_path": "a", **other, "conversations": turns}, "bad_record")
        assert "has both 'image_" in reason and "Keep one of them" in reason


def test_a_video_without_images_may_be_called_image() -> None:
    """As in LLaVA-NeXT, whose only tag is ``<image>``."""
    assert ask("<image>\nWhere?", video="v").parts == (VideoItem("v"), TextPart("Where?"))
    assert ask("<image><video>?", videos=["v", "w"]).parts == (VideoItem("v"), VideoItem("w"), TextPart("?"))
    assert ask("<video><image>?", video="v", image="a").parts == (VideoItem("v"), ImageItem("a"), TextPart("?"))
    reason = reason_of_question("<image><image>?", "too_many_tags", video="v")
    assert (
        "2 <video> tags in user and tool turns (where no image is given, <image> stands for a video), 1 video" in reason
    )


TURNS_WITH_MEDIA: list[tuple[dict[str, Any], Any]] = [
    ({"content": " Who? ", "images": ["a", "b"]}, (ImageItem("a"), ImageItem("b"), TextPart(" Who? "))),
    ({"content": "", "images": ["a"]}, (ImageItem("a"),)),
    ({"content": "Who is <image>?", "image": "a"}, (TextPart("Who is"), ImageItem("a"), TextPart("?"))),
    ({"content": "<image>?", "video": "v"}, (VideoItem("v"), TextPart("?"))),
    ({"content": [{"type": "text", "text": "Who?"}], "images": ["a"]}, (ImageItem("a"), TextPart("Who?"))),
    (
        {"content": [{"type": "text", "text": "Who?"}, {"type": "image"}], "image_path": "a"},
        (TextPart("Who?"), ImageItem("a")),
    ),
]


@pytest.mark.parametrize(("turn", "parts"), TURNS_WITH_MEDIA)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_media_of_a_turn(role: str, turn: dict[str, Any], parts: Any) -> None:
    others = [{"role": "user", "content": "Look: <video>"}, {"role": "assistant", "content": "So?"}]
    conversation = build({"video": "z", "messages": [*others, {"role": role, **turn}, ANSWER]})
    assert conversation.messages[0].parts == (TextPart("Look:"), VideoItem("z"))
    assert conversation.messages[2].parts == parts
    assert conversation.unread_keys == ()


def test_a_tag_that_a_turn_has_no_media_for_is_one_of_the_sample() -> None:
    turn = {"role": "user", "content": "<video><image>?", "video": "v"}
    conversation = build({"image": "z", "messages": [turn, ANSWER]})
    assert conversation.media() == (VideoItem("v"), ImageItem("z"))


@pytest.mark.parametrize(
    ("turn", "category", "said"),
    [
        ({"role": "user", "content": "<image>", "images": ["a", "b"]}, "too_few_tags", "turn 1 (user): 1 <image> tag"),
        ({"role": "user", "content": "<image>" * 2, "images": ["a"]}, "too_many_tags", "turn 1 (user): 2 <image> tags"),
        ({"role": "user", "content": [{"type": "image", "image": "a"}], "images": ["b"]}, "too_few_tags", "turn 1"),
        ({"role": "user", "content": "?", "images": [3]}, "bad_record", "turn 1 (user): an image must be"),
        ({"role": "user", "content": "?", "images": ["a"], "image": "b"}, "bad_record", "turn 1 (user): it has both"),
        ({"role": "assistant", "content": "?", "images": ["a"]}, "bad_record", "only user and tool turns can"),
        ({"role": "system", "content": "?", "images": ["a"]}, "bad_record", "only user and tool turns can"),
    ],
)  # fmt: skip
def test_media_of_a_turn_that_cannot_be_shown(turn: dict[str, Any], category: str, said: str) -> None:
    assert said in reason_of({"messages": [turn, ANSWER]}, category)
