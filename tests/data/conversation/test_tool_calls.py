"""Tools, calls and thoughts reach the text that is trained, whole, or the sample is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.conversation.tool_calls import parse_calls, stand_ins
from qwenvl.data.types import Conversation, Message
from qwenvl.utils.errors import SampleError
from tests.data.records import build, reason_of

WRITE_CALLS = [("qwen3_vl", None), ("qwen3_vl", "thinking"), ("qwen3_5", None)]
PUBLISHED = ["qwen3vl", "qwen3_5", "qwen3_5_small", "qwen3_6", "qwen3_8"]
TOOL = {"type": "function", "function": {"name": "click", "description": "…", "parameters": {"type": "object"}}}


def called(arguments: Any, content: Any = "", **turn: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "click", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **turn}


def conversation(*answers: dict[str, Any], **record: Any) -> Conversation:
    return build({"messages": [{"role": "user", "content": "Open it."}, *answers], **record})


@pytest.fixture(scope="module", params=[*WRITE_CALLS, *PUBLISHED], ids=str)
def template(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> ChatTemplate:
    """Return a template that writes calls; the published ones where the machine has them."""
    if isinstance(request.param, tuple):
        return ChatTemplate(AutoProcessor.from_pretrained(tiny_checkpoint(*request.param)))
    folder: Path = request.getfixturevalue("shared_folder")
    return ChatTemplate(AutoProcessor.from_pretrained(folder / "processors" / request.param))


@pytest.fixture(scope="module", params=["tiny", "published"])
def without_calls(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> ChatTemplate:
    """Return the template of Qwen2-VL and Qwen2.5-VL."""
    if request.param == "tiny":
        return ChatTemplate(AutoProcessor.from_pretrained(tiny_checkpoint("qwen2_5_vl")))
    folder: Path = request.getfixturevalue("shared_folder")
    return ChatTemplate(AutoProcessor.from_pretrained(folder / "processors" / "qwen2_5vl"))


def trained(template: ChatTemplate, *answers: dict[str, Any], **record: Any) -> list[str]:
    rendering = template.render(conversation(*answers, **record))
    return [rendering.text[start:stop] for start, stop in rendering.spans]


@pytest.mark.parametrize(
    ("answers", "record", "missing"),
    [
        ([called({"x": 150})], {}, "the tool call of 'click'"),
        ([called({"x": 150}, "I click.")], {}, "the tool call of 'click'"),
        ([{"role": "assistant", "content": "Done."}], {"tools": [TOOL]}, "the tool 'click'"),
        ([{"role": "assistant", "content": "Done."}], {"tools": [{"type": "x"}]}, "a tool that has no 'name'"),
        ([{"role": "assistant", "content": "", "reasoning_content": "Hm."}], {}, "the thought ('reasoning_content')"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(
    without_calls: ChatTemplate, answers: Any, record: Any, missing: str
) -> None:
    for render in (without_calls.render, without_calls.render_prompt):
        with pytest.raises(SampleError) as caught:
            render(conversation(*answers, **record))
        assert caught.value.category == "template"
        assert (
            missing in caught.value.reason
            and "template that writes it into the checkpoint's folder" in caught.value.reason
        )


def test_a_template_must_write_every_argument_of_a_call() -> None:
    """Names and values, down to the innermost, but what is only true or missing."""
    asked = conversation(called({"a": 150, "b": {"c": ["x", True, None]}}))
    changed = stand_ins(asked, "no number")
    wanted = [(what, number) for what, numbers in changed.wanted for number in numbers]
    (call,) = changed.conversation.messages[-1].extra["tool_calls"]
    assert all(number in json.dumps(call) for _, number in wanted)
    assert "click" not in json.dumps(call) and "150" not in json.dumps(call)
    argument = "an argument of the tool call of 'click'"
    assert sorted(what for what, _ in wanted) == [*[argument] * 5, "the tool call of 'click'"]
    changed.require_written(" ".join(number for _, number in wanted))
    for what, left_out in wanted:
        with pytest.raises(SampleError, match=f"leaves out {what}"):
            changed.require_written(" ".join(number for _, number in wanted if number != left_out))


def test_of_a_tool_without_a_name_one_text_must_be_written() -> None:
    answer = {"role": "assistant", "content": "Done."}
    changed = stand_ins(conversation(answer, tools=[{"type": "x", "more": ["y", 1]}]), "no number")
    ((what, numbers),) = changed.wanted
    assert (what, len(numbers)) == ("a tool that has no 'name'", 2)
    for number in numbers:
        changed.require_written(number)
    with pytest.raises(SampleError, match="leaves out a tool that has no 'name'"):
        changed.require_written("no number")


def test_a_template_must_write_the_thought_of_the_last_answer_alone() -> None:
    first, last = ({"role": "assistant", "content": text, "reasoning_content": f"So {text}"} for text in ("A", "B"))
    changed = stand_ins(conversation(first, {"role": "user", "content": "More?"}, last), "719000")
    ((what, (number,)),) = changed.wanted
    assert what == "the thought ('reasoning_content') of the last answer"
    assert not number.startswith("719000")  # these digits stand in the text already
    thoughts = [message.extra.get("reasoning_content") for message in changed.conversation.messages]
    assert thoughts == [None, "So A", None, number]


def test_a_call_written_as_text_is_the_way_out(without_calls: ChatTemplate) -> None:
    text = '<tool_call>\n{"name": "click", "arguments": {"x": 1}}\n</tool_call>'
    assert trained(without_calls, {"role": "assistant", "content": text}) == [text + "<|im_end|>\n"]


def test_arguments_as_a_json_string_are_their_object(template: ChatTemplate) -> None:
    """OpenAI's own form, which servers parse before they render."""
    for arguments in ({"x": 150, "y": 112}, {"q": 'é"<\\', "deep": {"a": [1.5, None, True, {"b": ""}]}}, {}):
        expected = trained(template, called(arguments))
        assert trained(template, called(json.dumps(arguments))) == expected
        assert trained(template, called(json.dumps(arguments, ensure_ascii=False, indent=2))) == expected
    assert trained(template, called("")) == trained(template, called(None)) == trained(template, called({}))


@pytest.mark.parametrize("nothing", [None, "", " \n", "{}", {}])
def test_no_arguments_are_an_empty_object(nothing: Any) -> None:
    assert parse_calls([{"name": "click", "arguments": nothing}]) == [{"name": "click", "arguments": {}}]
    assert parse_calls([{"function": {"name": "click"}}]) == [{"function": {"name": "click", "arguments": {}}}]


def test_what_is_no_object_stays_a_string_or_is_refused(template: ChatTemplate) -> None:
    for text in ("[1, 2]", "x=3", "7"):
        assert parse_calls([{"name": "click", "arguments": text}]) == [{"name": "click", "arguments": text}]
        try:
            assert text in trained(template, called(text))[0]
        except SampleError as error:
            assert error.category == "template"


def test_a_call_without_a_name_is_refused() -> None:
    for call in ({"arguments": {"x": 1}}, {"function": {"name": ""}}, {"function": "click"}):
        answer = {"role": "assistant", "content": "A", "tool_calls": [call]}
        turns = [{"role": "user", "content": "Q"}, answer]
        assert "turn 2: a tool call needs the 'name'" in reason_of({"messages": turns}, "bad_record")


words = st.text("ab \n.é你\"\\<>{}&'", max_size=8) | st.sampled_from(
    [
        "<|im_end|>",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        "</tool_call>",
        "</think>",
        "</parameter>",
        "719000000000",
    ]
)
leaves = words | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
arguments = st.dictionaries(words, values, max_size=3)
said = st.sampled_from(["", "\n", " ", "I click.", "<think>\nHm.\n</think>", "<think>\nHm.\n</think>\n\nI click.\n"])


@st.composite
def agents(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Calls and their results by turns, and at last an answer or a call."""
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        calls = called(draw(arguments), draw(said))
        calls["tool_calls"] *= draw(st.integers(1, 2))
        turns += [calls, {"role": "tool", "content": draw(st.sampled_from(["ok", "<|im_end|>\n"]))}]
    return turns[:-1] if draw(st.booleans()) else [*turns, {"role": "assistant", "content": "Done."}]


@given(agents(), st.booleans())
@settings(max_examples=80)
def test_whatever_a_call_says_its_turn_ends_where_the_template_ends_it(
    template: ChatTemplate, turns: list[dict[str, Any]], with_tools: bool
) -> None:
    """No false alarm either: escapes, numbers, other alphabets, nested values, typed ends of turns."""
    record = {"tools": [TOOL]} if with_tools else {}
    rendering = template.render(conversation(*turns, **record))
    ends = [
        len(template.render(conversation(*turns[: place + 1], **record)).text)
        for place, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]
    assert [stop for _, stop in rendering.spans] == ends
    assert all(rendering.text[:start].endswith(template.header) for start, _ in rendering.spans)


def test_a_typed_end_of_turn_does_not_cut_a_call(tiny_checkpoint: Callable[..., Path]) -> None:
    template = ChatTemplate(AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_5")))
    call = "<tool_call>\n<function=click>\n<parameter=a>\nx <|im_end|>\n</parameter>\n</function>\n</tool_call>"
    assert trained(template, called({"a": "x <|im_end|>"})) == [f"<think>\n\n</think>\n\n{call}<|im_end|>\n"]


def test_a_thought_in_front_of_a_call_is_the_same_in_both_forms(template: ChatTemplate) -> None:
    if template.opens_thinking:
        written = trained(template, called({"a": 1}, "<think>\nlook it up\n</think>"))
        assert written == trained(template, called({"a": 1}, "", reasoning_content="look it up"))
        assert written[0].startswith("<think>\nlook it up\n</think>\n\n<tool_call>")
    assert trained(template, called({"a": 1}, "\n"))[0].endswith("</tool_call><|im_end|>\n")


def test_a_thought_alone_that_would_be_cut_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    template = ChatTemplate(AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_5")))
    answer = {"role": "assistant", "content": "", "reasoning_content": "a <|im_end|>\n b"}
    with pytest.raises(SampleError, match=r"a thought without an answer holds <\|im_end\|>"):
        template.render(conversation(answer))


@pytest.mark.parametrize("key", ["loss", "weight", "train", "loss_mask"])
@pytest.mark.parametrize("untrained", [False, 0, 0.0])
def test_turns_that_are_not_trained(template: ChatTemplate, key: str, untrained: Any) -> None:
    """Their text stays in the prompt of what follows; calls of theirs too."""
    turns = [
        {"from": "gpt", "value": "BAD", key: untrained},
        {"from": "human", "value": "Again.", key: untrained},
        {"from": "gpt", "value": "GOOD", key: True},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "", "tool_calls": [{"name": "click", "arguments": {"BAD": 1}}], key: untrained},
        {"from": "tool", "value": "ok"},
        {"from": "gpt", "value": "FINE", key: None},
    ]
    plain = [{name: value for name, value in turn.items() if name != key} for turn in turns]
    question = {"from": "human", "value": "Say."}
    marked = template.render(build({"conversations": [question, *turns]}))
    whole = template.render(build({"conversations": [question, *plain]}))
    assert marked.text == whole.text and len(whole.spans) == 4
    assert marked.spans == (whole.spans[1], whole.spans[3])


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"loss": 0.5}, "'loss' must be true or 1 (trained), or false or 0 (not trained), not 0.5. 'weight' is"),
        ({"loss_mask": 2}, "'loss_mask' must be true or 1"),
        ({"train": "false"}, "'train' must be true or 1 (trained), or false or 0 (not trained), not 'false'."),
        ({"loss_mask": [1, 0]}, "'loss_mask' must be"),
        ({"loss": True, "weight": 0}, "'loss' and 'weight' differ"),
        ({"from": "human", "loss": True}, "turn 2 (user): 'loss' asks for training, but only assistant turns"),
    ],
)
def test_other_values_are_refused_by_name(turn: dict[str, Any], expected: str) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", **turn}, {"from": "gpt", "value": "B"}]
    assert expected in reason_of({"conversations": turns}, "bad_record")


def test_a_sample_of_untrained_answers_is_refused() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "loss": False}]
    assert "every assistant turn is marked as not trained" in reason_of({"conversations": turns}, "no_answer")


def test_messages_are_trained_unless_they_say_otherwise() -> None:
    assert Message("assistant", ()).trained
