"""Records to turns: every form that is read, what each tag is bound to, and every way a record can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl.data.types import ImageItem, Message, TextPart, VideoItem
from qwenvl.utils.errors import SampleError
from tests.data.records import ANSWER, ORIGIN, RESERVED, ask, build, reason_of


def test_sharegpt_and_openai_forms_are_one() -> None:
    turns = [("system", "be brief"), ("human", "<image>\nwhat?"), ("gpt", "a cat"), ("observation", "{}")]
    aliases = {"human": "user", "gpt": "assistant", "observation": "tool"}
    sharegpt = build({"image": "a.jpg", "conversations": [{"from": role, "value": text} for role, text in turns]})
    openai = build(
        {"images": ["a.jpg"], "messages": [{"role": aliases.get(role, role), "content": text} for role, text in turns]}
    )
    mixed = build({"image": "a.jpg", "messages": [{"from": role, "content": text} for role, text in turns]})
    assert sharegpt == openai == mixed
    assert [message.role for message in sharegpt.messages] == ["system", "user", "assistant", "tool"]
    assert sharegpt.messages[1].parts == (ImageItem("a.jpg"), TextPart("what?"))
    assert sharegpt.media() == (ImageItem("a.jpg"),)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("  keep me \n", (TextPart("  keep me \n"),)),
        ("<image>\n  def f():\n    pass\n", (ImageItem("a"), TextPart("def f():\n    pass\n"))),
        (" \n look: <image>", (TextPart(" \n look:"), ImageItem("a"))),
        ("is <image> red?", (TextPart("is"), ImageItem("a"), TextPart("red?"))),
        ("<image>\u3000\n", (ImageItem("a"),)),
        ("<Image> and <image>", (TextPart("<Image> and"), ImageItem("a"))),
    ],
)
def test_only_white_space_that_touches_a_tag_goes(text: str, parts: Any) -> None:
    fields = {"image": "a"} if "<image>" in text else {}
    assert ask(text, **fields).parts == parts


def test_tags_in_answers_system_turns_and_typed_text_are_words() -> None:
    conversation = build(
        {
            "image": "a.jpg",
            "conversations": [
                {"from": "system", "value": "an <image> is a picture"},
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": " The <image> tag. <video>\n"},
                {"from": "human", "value": [{"type": "text", "text": " <image> "}]},
            ],
        }
    )
    assert conversation.messages[0].parts == (TextPart("an <image> is a picture"),)
    assert conversation.messages[2].parts == (TextPart(" The <image> tag. <video>\n"),)
    assert conversation.messages[3].parts == (TextPart(" <image> "),)


def test_null_and_empty_fields_are_absent() -> None:
    record = {"image": None, "images": [], "video": "", "tools": None, "system": "", "messages": None}
    assert ask("hi", **record).parts == (TextPart("hi"),)


def test_tools_calls_and_reasoning_are_kept() -> None:
    tool = {"type": "function", "function": {"name": "look"}}
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "<image>"}'}}
    parsed = {"type": "function", "function": {"name": "look", "arguments": {"at": "<image>"}}}
    turns = [
        {"role": "user", "content": "look", "timestamp": 3},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "seen: <image>", "tool_call_id": "1", "name": "look"},
        {"role": "assistant", "content": "a cat", "reasoning_content": "fur"},
    ]
    for tools in ([tool], json.dumps([tool])):
        conversation = build({"messages": turns, "tools": tools, "system": "be brief", "image": "a.jpg"})
        assert conversation.tools == (tool,)
        assert conversation.unread_keys == ("'timestamp' of turns",)
        assert conversation.messages == (
            Message("system", (TextPart("be brief"),)),
            Message("user", (TextPart("look"),)),
            Message("assistant", (), {"tool_calls": [parsed]}),
            Message("tool", (TextPart("seen:"), ImageItem("a.jpg")), {"name": "look", "tool_call_id": "1"}),
            Message("assistant", (TextPart("a cat"),), {"reasoning_content": "fur"}),
        )


def test_a_system_field_that_repeats_the_system_turn_is_not_doubled() -> None:
    turns = [{"from": "system", "value": "short"}, {"from": "human", "value": "hi"}, ANSWER]
    assert len(build({"system": "short", "conversations": turns}).messages) == 3
    assert "differ" in reason_of({"system": "long", "conversations": turns}, "bad_record")


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "a <|image_pad|>"}, ANSWER]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<|image_pad|>"}]},
        {"conversations": [{"from": "system", "value": "<|image_pad|>"}, ANSWER]},
        {"conversations": [{"from": "human", "value": [{"type": "text", "text": "<|image_pad|>"}]}, ANSWER]},
        {"conversations": [ANSWER], "system": "<|image_pad|>"},
        {"conversations": [ANSWER], "tools": [{"name": "<|image_pad|>"}]},
        {"conversations": [ANSWER], "tools": '[{"<|image_pad|>": 1}]'},
        {"conversations": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": {"x": ["<|image_pad|>"]}}]}]},
        {"conversations": [{**ANSWER, "reasoning_content": "<|image_pad|>"}]},
    ],
)
def test_reserved_tokens_are_refused_everywhere(record: Any) -> None:
    assert "<|image_pad|>" in reason_of(record, "reserved_token")


def test_a_reserved_token_names_its_turn() -> None:
    turns = [{"from": "human", "value": "a"}, ANSWER, {"from": "human", "value": "<|vision_start|>"}, ANSWER]
    reason = reason_of({"conversations": turns, "system": "s"}, "reserved_token")
    assert "turn 3 (user) holds <|vision_start|>" in reason


def test_a_conversation_needs_an_answer() -> None:
    reason_of({"conversations": [{"from": "human", "value": "hello?"}]}, "no_answer")


@pytest.mark.parametrize("role", ["Humano", "bot", "", None, 3, ["user"], {"a": 1}])
def test_unknown_roles_are_named(role: Any) -> None:
    reason = reason_of({"conversations": [{"from": role, "value": "x"}, ANSWER]}, "bad_role")
    assert "turn 1" in reason and "human, user, gpt" in reason


BAD_RECORDS: dict[str, tuple[Any, str]] = {
    "not an object": (3, "must be an object"),
    "nothing": ({"text": "x"}, "keys: text"),
    "both": ({"conversations": [ANSWER], "messages": [ANSWER]}, "both"),
    "no turns": ({"conversations": []}, "an empty list"),
    "turns not a list": ({"conversations": "x"}, "not str"),
    "turn not an object": ({"conversations": ["x"]}, "turn 1 must be an object"),
    "number as text": ({"conversations": [{"from": "gpt", "value": 3}]}, "turn 1 (assistant): its text"),
    "no text": ({"conversations": [{"from": "human", "value": None}, ANSWER]}, "neither text nor media"),
    "empty text": ({"conversations": [{"from": "human", "value": ""}, ANSWER]}, "neither text nor media"),
    "no parts": ({"conversations": [{"from": "human", "value": []}, ANSWER]}, "neither text nor media"),
    "no answer": ({"conversations": [{"from": "gpt", "value": None}]}, "neither text nor media"),
    "from and role": ({"conversations": [{**ANSWER, "role": "user"}]}, "which differ"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "of type 'audio'"),
    "part without type": ({"messages": [{"role": "user", "content": [{"image": "x"}]}]}, "of type None"),
    "part not an object": ({"messages": [{"role": "user", "content": ["x"]}]}, "has a part 'x'"),
    "text part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'text'"),
    "image in an answer": (
        {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
        "turn 1 (assistant) holds an image",
    ),
    "unknown setting": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "max_pixel": 3}]}]},
        "turn 1 (user): 'max_pixel' is not a setting of images: min_pixels, max_pixels. Did you mean 'max_pixels'",
    ),
    "fps of an image": ({"image": {"image": "a", "fps": 3}, "conversations": [ANSWER]}, "'fps'"),
    "sample_fps of a file": ({"video": {"video": "v", "sample_fps": 3}, "conversations": [ANSWER]}, "'sample_fps'"),
    "text as pixels": ({"image": {"image": "a", "max_pixels": "9"}, "conversations": [ANSWER]}, "whole number"),
    "fps 0": ({"video": {"video": "v", "fps": 0}, "conversations": [ANSWER]}, "above 0"),
    "fps infinite": ({"video": {"video": "v", "fps": float("inf")}, "conversations": [ANSWER]}, "above 0"),
    "start below 0": ({"video": {"video": "v", "video_start": -1}, "conversations": [ANSWER]}, "0 or more"),
    "end before start": (
        {"video": {"video": "v", "video_start": 3, "video_end": 2}, "conversations": [ANSWER]},
        "'video_start' 3.0 is above",
    ),
    "fps and nframes": ({"video": {"video": "v", "fps": 1, "nframes": 4}, "conversations": [ANSWER]}, "Keep one"),
    "image and images": ({"image": "a", "images": ["b"], "conversations": [ANSWER]}, "both 'image' and 'images'"),
    "two sources": ({"image": {"image": "a", "path": "b"}, "conversations": [ANSWER]}, "'image' and 'path'"),
    "image a number": ({"image": 3, "conversations": [ANSWER]}, "an image must be"),
    "null in a list": ({"image": ["a", None], "conversations": [ANSWER]}, "an image must be"),
    "empty string in a list": ({"image": ["a", ""], "conversations": [ANSWER]}, "an image must be"),
    "image without source": ({"image": {"max_pixels": 3}, "conversations": [ANSWER]}, "an image must be"),
    "video of no frames": ({"video": [[]], "conversations": [ANSWER]}, "a video must be"),
    "frame with limits": ({"video": [[{"path": "a", "max_pixels": 3}]], "conversations": [ANSWER]}, "a frame"),
    "system a number": ({"system": 3, "conversations": [ANSWER]}, "'system' must be a string"),
    "tools not JSON": ({"tools": "{", "conversations": [ANSWER]}, "not JSON"),
    "tools an object": ({"tools": {}, "conversations": [ANSWER]}, "list of objects"),
    "tool calls a string": ({"conversations": [{**ANSWER, "tool_calls": "x"}]}, "'tool_calls' must be a list"),
    "tool calls of strings": ({"conversations": [{**ANSWER, "tool_calls": ["x"]}]}, "list of objects"),
    "half a surrogate pair": ({"conversations": [{"from": "gpt", "value": "a\ud83d"}]}, "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_records_are_explained(case: str) -> None:
    record, expected = BAD_RECORDS[case]
    assert expected in reason_of(record, "bad_record")


def test_deep_records_are_refused() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    for record in ({"image": deep, "conversations": [ANSWER]}, {"messages": [{"from": deep, "role": [deep]}]}):
        with pytest.raises(SampleError):
            build(record)


pieces = st.lists(
    st.sampled_from(["<image>", "<video>", "<image", ">", " ", "\n", "\u3000", "word", "é", "<|image", "_pad|>"])
    | st.text()
)


@given(texts=st.lists(pieces.map("".join), min_size=1))
def test_text_survives_and_every_medium_is_bound_once_in_order(texts: list[str]) -> None:
    """Joined with their tags, the parts are the text as written, but for white space that touches a tag."""
    counts = [sum(text.count(tag) for text in texts) for tag in ("<image>", "<video>")]
    record = {
        "images": [f"i{number}" for number in range(counts[0])],
        "videos": [f"v{number}" for number in range(counts[1])],
        "conversations": [turn for text in texts for turn in ({"from": "human", "value": text + "."}, ANSWER)],
    }
    if any(token in text for token in RESERVED for text in texts):
        reason_of(record, "reserved_token")
        return
    conversation = build(record)
    for text, message in zip(texts, conversation.messages[::2], strict=True):
        tags = {ImageItem: "<image>", VideoItem: "<video>"}
        joined = "".join(part.text if isinstance(part, TextPart) else tags[type(part)] for part in message.parts)
        assert joined == re.sub(r"\s*(<image>|<video>)\s*", r"\1", text + ".")
    images = [item.source for item in conversation.media() if isinstance(item, ImageItem)]
    videos = [item.source for item in conversation.media() if isinstance(item, VideoItem)]
    assert images == record["images"] and videos == record["videos"]


known_words = st.sampled_from(
    ["conversations", "messages", "from", "value", "role", "content", "human", "gpt", "user", "assistant", "system"]
    + ["type", "text", "image", "images", "image_url", "url", "path", "bytes", "video", "videos", "frames", "fps"]
    + ["nframes", "max_pixels", "video_start", "tool", "tools", "tool_calls", "<image>", "<video>", "a.jpg"]
    + ["query", "response", "history", "prompt", "completion", "conversation", "instruction", "input", "output"]
    + ["image_path", "image_1", "image_", "start", "end", "audio", "label", "<img>a.jpg</img>", "<audio>"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | known_words | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(known_words | st.text(max_size=3), inner, max_size=5),
    max_leaves=20,
)
turns = st.fixed_dictionaries({"from": st.just("gpt") | values}, optional={"value": values, "tool_calls": values})
samples = st.fixed_dictionaries(
    {"conversations": st.lists(turns, max_size=4) | values},
    optional=dict.fromkeys(("image", "images", "video", "videos", "system", "tools", "start", "image_path"), values),
)
other_forms = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("query", "response", "history", "prompt", "completion", "conversation"), values)
)


@settings(max_examples=300)
@given(record=values | samples | other_forms)
def test_any_record_gives_a_conversation_or_a_sample_error(record: Any) -> None:
    try:
        conversation = build(record)
    except SampleError as error:
        assert error.origin == ORIGIN and error.reason
    else:
        assert conversation.messages


def test_the_official_samples(pytestconfig: pytest.Config) -> None:
    folder = Path(__file__).resolve().parents[3].parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("the golden samples are not here")
    for record in json.loads((folder / "samples.json").read_text()):
        conversation = build(record)
        listed = [record.get(key) or [] for key in ("image", "video")]
        expected = sum(len(value) if isinstance(value, list) else 1 for value in listed)
        assert len(conversation.media()) == expected
