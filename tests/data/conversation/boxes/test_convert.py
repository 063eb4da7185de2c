"""Boxes: converters against independent arithmetic, what of a text changes, and which picture a box lies in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.data.conversation.boxes.convert import convert_boxes, from_coco, from_voc, from_yolo, to_family, to_pixels
from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.media.resize import ImagePlan, VideoPlan, smart_resize
from qwenvl.data.types import Conversation, ImageItem, Message, Sample, VideoItem
from qwenvl.families import FAMILIES, get_family
from qwenvl.utils.errors import Origin, SampleError

RELATIVE, RESIZED = get_family("qwen3_vl"), get_family("qwen2_5_vl")
SIZE, FITTED = (480, 640), (476, 644)
sides = st.integers(1, 5000)


def picture(size: tuple[int, int] = SIZE, resized: tuple[int, int] = FITTED, name: str = "a.jpg") -> ImagePlan:
    return ImagePlan(ImageItem(name), resized, (1, resized[0] // 14, resized[1] // 14), size)


def sample_of(*values: str, **fields: Any) -> Sample:
    turns = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]
    return Sample(Origin("set", "set.jsonl", 1), {"conversations": turns, "bbox_format": "pixel", **fields})


def convert(sample: Sample, *media: Any, family: Any = RELATIVE) -> Conversation:
    return convert_boxes(build_conversation(sample, ()), media or (picture(),), sample, family)


def answer(text: str, family: Any = RELATIVE, **fields: Any) -> str:
    """Convert an answer about one picture of 640 x 480 pixels, resized to 644 x 476."""
    sample = sample_of("<image>Where?", text, image="a.jpg", **fields)
    return convert(sample, family=family).messages[-1].text


def reason(call: Callable[[], Any], category: str = "bad_boxes") -> str:
    with pytest.raises(SampleError) as caught:
        call()
    assert caught.value.category == category
    return caught.value.reason


def test_families_write_boxes_as_their_cookbooks_say() -> None:
    assert {name for name, family in FAMILIES.items() if family.boxes == "resized_pixels"} == {"qwen2_5_vl"}


def test_the_example_of_the_official_notebook() -> None:
    """Its box and its picture, at its limits (14 * 14 * 4 * 1280 pixels, factor 28)."""
    size = (428, 640)
    assert to_family([146, 137, 615, 415], size, (0, 0), RELATIVE) == [228, 320, 961, 970]
    resized = smart_resize(*size, 28, 56 * 56, 14 * 14 * 4 * 1280)
    assert to_family([146, 137, 615, 415], size, resized, RESIZED) == [147, 134, 619, 407]


def nearest(value: int, extent: int, written: int) -> int:
    """Round value * written / extent in whole numbers, halves to the even one."""
    whole, rest = divmod(value * written, extent)
    return whole + (2 * rest > extent or (2 * rest == extent and whole % 2 == 1))


@given(st.data(), sides, sides, sides, sides)
def test_coordinates_against_whole_number_arithmetic(
    data: st.DataObject, height: int, width: int, rows: int, columns: int
) -> None:
    x, y = data.draw(st.integers(0, width)), data.draw(st.integers(0, height))
    assert to_family([x, y], (height, width), (rows, columns), RELATIVE) == [
        nearest(x, width, 1000),
        nearest(y, height, 1000),
    ]
    assert to_family([x, y], (height, width), (rows, columns), RESIZED) == [
        min(nearest(x, width, columns), columns - 1),
        min(nearest(y, height, rows), rows - 1),
    ]


@given(st.data(), sides, sides, sides, sides)
def test_there_and_back_is_within_one_unit(
    data: st.DataObject, height: int, width: int, rows: int, columns: int
) -> None:
    x, y = data.draw(st.floats(0, width)), data.draw(st.floats(0, height))
    for family, units in ((RELATIVE, (1000, 1000)), (RESIZED, (columns, rows))):
        written = to_family([x, y], (height, width), (rows, columns), family)
        back = to_pixels(written, (rows, columns), family, (height, width))
        assert abs(back[0] - x) <= width / units[0] * (1 + 1e-9)
        assert abs(back[1] - y) <= height / units[1] * (1 + 1e-9)


def test_boxes_of_other_datasets() -> None:
    """One box, columns 10 to 29 and rows 20 to 59 of a picture of 100 x 200 pixels, in four notations."""
    assert from_coco((10, 20, 20, 40)) == (10, 20, 30, 60)
    assert from_voc((11, 21, 30, 60)) == (10, 20, 30, 60)
    assert from_yolo((0.2, 0.2, 0.2, 0.2), (200, 100)) == pytest.approx((10, 20, 30, 60))


@given(st.data(), st.integers(1, 9000), sides)
def test_a_box_is_never_written_empty(data: st.DataObject, width: int, columns: int) -> None:
    """It stays within one unit of what was meant, and holds some of it."""
    x1 = data.draw(st.floats(0, width, exclude_max=True))
    x2 = data.draw(st.floats(x1, width, exclude_min=True))
    for family, last in ((RELATIVE, 1000), (RESIZED, columns - 1)):
        left, top, right, bottom = to_family([x1, 0, x2, 9], (9, width), (900, columns), family)
        assert (0 <= left < right <= last or (last == 0 and left == right == 0)) and top < bottom
        scale = (1000 if family is RELATIVE else columns) / width
        assert left - 1 < x1 * scale + 1e-6 and x2 * scale - 1e-6 < right + 1.5
        assert left <= x2 * scale + 1e-6 and x1 * scale - 1e-6 <= right + 1


def test_one_pixel_of_a_large_picture_has_a_width() -> None:
    assert to_family([100, 133, 101, 134], (4000, 4000), (0, 0), RELATIVE) == [25, 33, 26, 34]
    assert to_family([98, 0, 99.9, 40], (4000, 4000), (0, 0), RELATIVE) == [24, 0, 25, 10]
    assert to_family([3999, 3999, 4000, 4000], (4000, 4000), (0, 0), RELATIVE) == [999, 999, 1000, 1000]
    assert to_family([0, 3999, 1, 4000], (4000, 4000), (1008, 1008), RESIZED) == [0, 1006, 1, 1007]


BOX = [64, 48, 320, 240]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"bbox_2d": [64, 48, 320, 240], "label": "cup 64"}', '{"bbox_2d": [100, 100, 500, 500], "label": "cup 64"}'),
        (
            '```json\n[\n\t{"bbox_2d" :[64,\n 48.0,320,240 ]}\n]\n```',
            '```json\n[\n\t{"bbox_2d" :[100,\n 100,500,500 ]}\n]\n```',
        ),
        ('{"point_2d": [319.9999, 2.4e2]}', '{"point_2d": [500, 500]}'),
        ("<|box_start|>(64,48), (320,240)<|box_end|>.", "<|box_start|>(100,100), (500,500)<|box_end|>."),
        (
            "<|quad_start|>(64,48),(320,48),(320,240),(64,240)<|quad_end|>",
            "<|quad_start|>(100,100),(500,100),(500,500),(100,500)<|quad_end|>",
        ),
        ("swipe(320, 240, 64, 48)", "swipe(500, 500, 100, 100)"),  # two points, and no corners
        ("{'bbox_2d': [64, 48, 320, 240]}", "{'bbox_2d': [100, 100, 500, 500]}"),
        (r'"{\"bbox_2d\": [64, 48, 320, 240]}"', r'"{\"bbox_2d\": [100, 100, 500, 500]}"'),
        ('{"bbox_2d": [-0.5, 0, 640.01, 480]}', '{"bbox_2d": [0, 0, 1000, 1000]}'),
        ("[64, 48, 320, 240] bbox_2d: [64]", "[64, 48, 320, 240] bbox_2d: [64]"),
        ('Write {"bbox_2d": [x1, y1, x2, y2]}, or [].', 'Write {"bbox_2d": [x1, y1, x2, y2]}, or [].'),
        ('{"bbox_2d": [], "bbox_3d": [1, 2]}', '{"bbox_2d": [], "bbox_3d": [1, 2]}'),
        ('{"bbox_2d": null, "a": "<|box_start|>"}', '{"bbox_2d": null, "a": "<|box_start|>"}'),
    ],
)
def test_written_forms(written: str, expected: str) -> None:
    assert answer(written) == expected


def test_pixels_of_the_resized_picture() -> None:
    written = '{"bbox_2d": [64, 48, 640, 480]}<|box_start|>(64,48),(640,480)<|box_end|>'
    assert answer(written, RESIZED) == '{"bbox_2d": [64, 48, 643, 475]}<|box_start|>(64,48),(643,475)<|box_end|>'


@given(st.text(), st.text(), st.text())
def test_the_rest_of_a_text_stays(before: str, between: str, after: str) -> None:
    def text(*values: int) -> str:
        return f'{before}"bbox_2d": {list(values)}{between}<|box_start|>({values[0]},1),(9,9)<|box_end|>{after}'

    sample = sample_of("<image>", text(*BOX).replace("(64,1),(9,9)", "(64,48),(320,240)"), image="a.jpg")
    try:
        build_conversation(sample, ())
    except SampleError:  # half of a surrogate pair
        return
    expected = text(100, 100, 500, 500).replace("(100,1),(9,9)", "(100,100),(500,500)")
    assert convert(sample).messages[-1].text == expected


def test_all_turns_and_only_their_text() -> None:
    box = json.dumps({"bbox_2d": BOX})
    sample = sample_of(f"Is {box} in <image> red?", box, f"And {box}?", box, image="a.jpg", system=box)
    messages = convert(sample).messages
    assert [message.text.count("[100, 100, 500, 500]") for message in messages] == [1] * 5
    assert messages[1].parts[1] == ImageItem("a.jpg")
    assert convert(replace(sample, record={**sample.record, "bbox_format": None})).messages[1].text.count("64") == 1


def test_tool_calls_and_reasoning() -> None:
    call = {"name": "zoom", "arguments": {"bbox_2d": BOX, "box": [1, 2], "schema": {"bbox_2d": {"type": "array"}}}}
    written = {"function": {"name": "zoom", "arguments": json.dumps({"point_2d": [64, 48]}, indent=1)}}
    turn = {"role": "assistant", "tool_calls": [call, written], "reasoning_content": f'"bbox_2d": {BOX}'}
    record = {"messages": [{"role": "user", "content": "<image>?"}, turn], "image": "a", "bbox_format": "pixel"}
    extra = convert(Sample(Origin("d", "f", 1), record)).messages[-1].extra
    assert extra["tool_calls"][0]["arguments"] == call["arguments"] | {"bbox_2d": [100, 100, 500, 500]}
    assert extra["tool_calls"][1]["function"]["arguments"] == {"point_2d": [100, 100]}
    assert extra["reasoning_content"] == '"bbox_2d": [100, 100, 500, 500]'
    turn["tool_calls"] = [{"name": "zoom", "arguments": {"bbox_2d": [1, 2, "3", 4]}}]
    assert "4 numbers are needed" in reason(lambda: convert(Sample(Origin("d", "f", 1), record)))
    conversation = Conversation((Message("assistant", (), {"tool_calls": nested(100_000)}),))
    sample = Sample(Origin("d", "f", 1), record)
    found = reason(lambda: convert_boxes(conversation, (picture(),), sample, RELATIVE), "bad_record")
    assert found == "a tool call is nested too deeply to be read."


def test_coordinates_of_calls() -> None:
    """As objects and as JSON strings, in the forms of the families' own agents."""
    arguments = {"action": "swipe", "coordinate": [64, 48], "coordinate2": (320, 240), "x": 64, "time": 48}
    calls = [
        {"name": "computer_use", "arguments": arguments},
        {"name": "computer_use", "arguments": json.dumps(arguments)},
        {"name": "click", "arguments": {"start_box": "(64,48)", "point": "[64, 48]", "label": "(64,48)"}},
        {"name": "zoom", "arguments": {"bbox_2d": [[64, 48, 320, 240], [0, 0, 64, 48]], "point": ["x", "y"]}},
    ]
    turn = {"role": "assistant", "tool_calls": calls}
    record = {"messages": [{"role": "user", "content": "<image>?"}, turn], "image": "a", "bbox_format": "pixel"}
    found = [
        call["arguments"] for call in convert(Sample(Origin("d", "f", 1), record)).messages[-1].extra["tool_calls"]
    ]
    converted = {**arguments, "coordinate": [100, 100], "coordinate2": [500, 500]}
    assert found[:2] == [converted, converted]
    assert found[2] == {"start_box": "(100,100)", "point": "[100, 100]", "label": "(64,48)"}
    assert found[3] == {"bbox_2d": [[100, 100, 500, 500], [0, 0, 100, 100]], "point": ["x", "y"]}


@pytest.mark.parametrize(
    ("text", "fields", "family", "expected"),
    [
        ("Tap 64 by 48.", {}, RELATIVE, True),
        ('{"x": 64, "y": 48}', {}, RELATIVE, True),
        ("No cup, 1 plate.", {}, RELATIVE, False),
        ('{"point": [64, 48]} of 640 x 480', {}, RELATIVE, False),
        ("Tap 64 by 48.", {"bbox_format": None}, RELATIVE, False),
        ("Tap 64 by 48.", {"bbox_format": "relative_1000"}, RELATIVE, False),
        ("Tap 64 by 48.", {"bbox_format": "relative_1000"}, RESIZED, True),
    ],
)
def test_numbers_of_which_none_is_converted(text: str, fields: dict[str, Any], family: Any, expected: bool) -> None:
    sample = sample_of("<image>Where?", text, image="a.jpg", **fields)
    assert convert(sample, family=family).unconverted is expected
    call = {"role": "assistant", "tool_calls": [{"name": "tap", "arguments": {"text": text}}]}
    turns = [{"role": "user", "content": "<image>?"}, call]
    record = {"messages": turns, "image": "a.jpg", "bbox_format": "pixel", **fields}
    assert convert(Sample(Origin("d", "f", 1), record), family=family).unconverted is expected


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list, deeper than Python calls functions."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ('{"bbox_2d": [64, 48, 641, 240]}', ["[64, 48, 641, 240]", "assistant", "a.jpg", "640 pixels wide"]),
        ('{"bbox_2d": [64, 48, 320, 481]}', ["640 pixels wide and 480 high"]),
        ('{"point_2d": [-1, 48]}', ["640 pixels wide and 480 high"]),
        ('{"bbox_2d": [1e999, 48, 320, 240]}', ["640 pixels wide and 480 high"]),
        ('{"bbox_2d": [320, 48, 320, 240]}', ["x1 < x2 and y1 < y2"]),
        ('{"bbox_2d": [64, 240, 320, 48]}', ["x1 < x2 and y1 < y2"]),
        ('{"bbox_2d": [64, 48, 320]}', ["4 numbers"]),
        ('{"point_2d": [64, 48, 320]}', ["2 numbers"]),
        ('{"bbox_2d": [64, 48, 32O, 240]}', ["4 numbers"]),
        ('{"bbox_2d": [[64, 48, 320, 240], [1, 2]]}', ["4 numbers", "[1, 2]"]),
        ('{"bbox_2d": [64, 48, ', ["4 numbers"]),
        ("<|box_start|>(64,48),(1)<|box_end|>", ["2 or 4 numbers", "<|box_start|>(64,48),(1)<|box_end|>"]),
        ('{"coordinate": [64, 481]}', ["[64, 481]", "480 high"]),
        ("<point>64 48 12</point>", ["2 numbers"]),
        ("click(641, 48)", ["click(641, 48", "640 pixels wide"]),
    ],
)
def test_boxes_that_cannot_be_converted(written: str, parts: list[str]) -> None:
    found = reason(lambda: answer(written))
    assert all(part in found for part in parts), found


def test_all_bad_boxes_are_found() -> None:
    wrong = [
        '{"bbox_2d": [64, 48, 641, 240]}',
        '{"bbox_2d": [64]}',
        '{"point_2d": [1, 2]}',
        '{"bbox_2d": [9, 9, 8, 8]}',
    ]
    sample = sample_of("<image>" + wrong[0], " ".join(wrong[1:]), image="a.jpg")
    found: list[SampleError] = []
    convert_boxes(build_conversation(sample, ()), [picture()], sample, RELATIVE, found)
    assert [error.category for error in found] == ["bad_boxes"] * 3
    assert [box for error in found for box in ("641", "[64]", "[9, 9, 8, 8]") if box in error.reason] == [
        "641",
        "[64]",
        "[9, 9, 8, 8]",
    ]


def test_several_pictures_of_one_size() -> None:
    box = json.dumps({"bbox_2d": BOX})
    sample = sample_of("<image><image>Where?", box, image=["a.jpg", "b.jpg"])
    assert "[100, 100, 500, 500]" in convert(sample, picture(), picture(name="b.jpg")).messages[-1].text
    found = reason(lambda: convert(sample, picture(), picture((960, 640))))
    assert "not known in which image" in found
    assert "process_bbox.ipynb" in found


def test_a_picture_in_every_user_turn() -> None:
    box = json.dumps({"bbox_2d": BOX})
    media = (picture(), picture((960, 1280), name="b.jpg"))
    two = ["<image>Where?", box, f"And {box} here?<image>", box]
    texts = [message.text for message in convert(sample_of(*two, image=["a", "b"]), *media).messages]
    assert ["[100, 100, 500, 500]" in text for text in texts] == [False, True, False, False]
    assert ["[50, 50, 250, 250]" in text for text in texts] == [False, False, True, True]
    found = reason(lambda: convert(sample_of(*two, image=["a", "b"], system=box), *media))
    assert "before the first image" in found
    assert "not known in which image" in reason(lambda: convert(sample_of(*two, "And?", box, image=["a", "b"]), *media))


def test_no_picture_and_videos() -> None:
    box = json.dumps({"bbox_2d": BOX})
    sample = sample_of("Where?", box)
    assert "no image" in reason(lambda: convert_boxes(build_conversation(sample, ()), (), sample, RELATIVE))
    clip = VideoPlan(VideoItem("v.mp4"), 8, 2.0, np.arange(8), FITTED, (4, 34, 46), (0.0,) * 4)
    assert "videos" in reason(lambda: convert(sample_of("<video>?", box, video="v.mp4"), clip))
    assert convert(sample_of("<video>?", "No box.", video="v.mp4"), clip).messages[-1].text == "No box."


def test_relative_coordinates_for_a_family_of_pixels() -> None:
    fields = {"bbox_format": "relative_1000"}
    box = json.dumps({"bbox_2d": [100, 100, 500, 1000]})
    assert answer(box, **fields) == box
    assert answer(box, RESIZED, **fields) == '{"bbox_2d": [64, 48, 322, 475]}'
    assert "0 to 1000" in reason(lambda: answer('{"bbox_2d": [1, 1, 1001, 2]}', **fields))


@pytest.mark.parametrize("value", ["pixels", 3, ["pixel"]])
def test_unknown_formats(value: Any) -> None:
    found = reason(lambda: answer("No box.", bbox_format=value), "bad_record")
    assert repr(value) in found
    assert '"pixel"' in found
