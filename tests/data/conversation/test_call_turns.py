"""Calls as turns of LLaMA-Factory and ms-swift: the conversation of ``tool_calls``; what is no call is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenvl.cli.show_sample import main
from qwenvl.data.types import Conversation, ImageItem
from tests.data.records import build, reason_of

CROP = {"name": "crop", "arguments": {"x": 10}}
LOOK = {"name": "look", "arguments": {"at": "left"}}
TOOL = {"name": "crop", "description": "cut out a part", "parameters": {"type": "object", "properties": {}}}
QUESTION = {"from": "human", "value": "<image>What is at the left?"}
ANSWER = {"from": "gpt", "value": "A red square."}


def chat(*turns: dict[str, Any], **record: Any) -> Conversation:
    return build({"conversations": [QUESTION, *turns, ANSWER], "images": ["a.png"], **record})


def assistant(*calls: dict[str, Any], text: str = "", **turn: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": list(calls), **turn}


def call_turn(content: Any, role: str = "function_call", **turn: Any) -> dict[str, Any]:
    return {"from": role, "value": content if not isinstance(content, dict | list) else json.dumps(content), **turn}


@pytest.mark.parametrize("call_role", ["function_call", "tool_call", "Tool_Call"])
@pytest.mark.parametrize(
    "answer_role",
    ["observation", "tool_response", "tool_result", "tool", "function", "function_response", "Observation"],
)
def test_calls_and_their_answers_are_those_of_openai(call_role: str, answer_role: str) -> None:
    result = {"from": answer_role, "value": "<image>"}
    images = {"images": ["a.png", "b.png"]}
    found = chat(call_turn(CROP, call_role), result, **images)
    assert found == chat(assistant(CROP), {"role": "tool", "content": "<image>"}, **images)
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1].extra == {"tool_calls": [CROP]} and found.messages[1].trained
    assert found.messages[2].parts == (ImageItem("b.png"),)


@pytest.mark.parametrize("names", [("Human", "GPT", "System"), ("USER", "Assistant", "SYSTEM")])
def test_speakers_are_read_in_any_case_of_letters(names: tuple[str, str, str]) -> None:
    user, answer, system = names
    turns = [{"from": system, "value": "s"}, {"from": user, "value": "q"}, {"from": answer, "value": "a"}]
    assert [message.role for message in build({"conversations": turns}).messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "content",
    [
        [CROP, LOOK],
        json.dumps([CROP, LOOK], indent=2),
        [CROP, {"type": "function", "function": LOOK}],
        [CROP, {"name": "look", "parameters": {"at": "left"}}],
        [CROP, {"name": "look", "arguments": '{"at": "left"}'}],
    ],
)
def test_several_calls_in_one_turn(content: Any) -> None:
    calls = chat(call_turn(content)).messages[1].extra["tool_calls"]
    assert [call.get("function", call) for call in calls] == [CROP, LOOK]


def test_calls_that_follow_one_another_are_one_answer() -> None:
    """The words before them as well: a server has them in one turn."""
    together = chat(assistant(CROP, LOOK, text="I look."))
    assert chat({"from": "gpt", "value": "I look."}, call_turn(CROP), call_turn(LOOK)) == together
    assert chat({"from": "gpt", "value": "I look."}, call_turn([CROP, LOOK])) == together
    for apart in ([call_turn(CROP), call_turn(LOOK, loss=False)], [call_turn(CROP), call_turn("<think>x</think>[]")]):
        turns = [*apart[:1], {**apart[1], "value": apart[1]["value"].replace("[]", json.dumps(LOOK))}]
        assert len(chat(*turns).messages) == 4  # trained otherwise; a thought that would stand behind a call


def test_content_may_be_an_object_or_parts() -> None:
    wanted = chat(assistant(CROP))
    for content in (CROP, [CROP], [{"type": "text", "text": json.dumps(CROP)}]):
        assert chat({"role": "tool_call", "content": content}) == wanted
    assert chat({"role": "tool_call", "content": None, "tool_calls": [CROP]}) == wanted


def test_a_thought_in_front_of_a_call_stays() -> None:
    found = chat(call_turn("<think>\nhm\n</think>\n\n" + json.dumps(CROP)))
    assert found == chat(assistant(CROP, text="<think>\nhm\n</think>"))
    apart = chat(call_turn("<think>\nhm\n</think>\n\n" + json.dumps(CROP), reasoning="hm"))
    assert apart == chat(assistant(CROP, reasoning_content="hm"))


def test_the_older_function_call_of_openai_is_a_call() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "crop", "arguments": '{"x": 10}'}}
    assert chat(old) == chat(assistant(CROP))
    assert chat({**old, "function_call": CROP, "tool_calls": [CROP]}) == chat(assistant(CROP))
    turns = [QUESTION, {**old, "tool_calls": [LOOK]}]
    reason = reason_of({"conversations": turns, "images": ["a"]}, "bad_record")
    assert "turn 2 has 'tool_calls' and 'function_call', which differ" in reason


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (call_turn("I look."), "turn 2 (function_call) must be a call as JSON, such as {"),
        (call_turn("{'name': 'crop'}", "tool_call"), "turn 2 (tool_call) must be a call as JSON"),
        (call_turn('<tool_call>\n{"name": "crop"}\n</tool_call>'), "belong into a turn of 'assistant' ('gpt')"),
        (call_turn("[]"), "a list of such calls, not '[]'"),
        (call_turn("3"), "a list of such calls, not '3'"),
        (call_turn(""), "must be a call as JSON"),
        ({"from": "tool_call", "value": None}, "must be a call as JSON"),
        (call_turn({"arguments": {}}), "turn 2 (function_call): a tool call needs the 'name'"),
        (call_turn({"name": "crop", "args": {"x": 1}}), "has no 'arguments', but 'args', which nothing reads"),
        (call_turn(CROP, tool_calls=[LOOK]), "has calls in its content and in 'tool_calls'"),
        ({"from": "human", "value": "q", "tool_calls": [CROP]}, "turn 2 (user) has 'tool_calls', which only assistant"),
        ({"from": "human", "value": "q", "reasoning": "hm"}, "turn 2 (user) has 'reasoning', which only assistant"),
    ],
)
def test_what_is_no_call_is_refused_by_name(turn: dict[str, Any], expected: str) -> None:
    record = {"conversations": [QUESTION, turn, ANSWER], "images": ["a.png"]}
    assert expected in reason_of(record, "bad_record")


@pytest.mark.parametrize(
    "role", ["function_calls", "tool_calls", "tool_use", "action", "toolcall", "tools", "tool_results", "functions"]
)
def test_a_hint_never_makes_an_answer_of_a_tool_of_a_call_or_a_call_of_it(role: str) -> None:
    reason = reason_of({"conversations": [{"from": role, "value": "x"}, ANSWER]}, "bad_role")
    assert "Did you mean" not in reason
    assert "function_call, tool_call" in reason


def test_a_hint_names_people() -> None:
    reason = reason_of({"conversations": [{"from": "Asistant", "value": "x"}, ANSWER]}, "bad_role")
    assert reason.endswith("Did you mean 'assistant'?")


def test_tools_without_a_function_around_them_get_one() -> None:
    """LLaMA-Factory's, and those of OpenAI's responses: what a server hands to the template."""
    wanted = {"type": "function", "function": TOOL}
    for tool in (wanted, TOOL, {"type": "function", **TOOL}):
        assert chat(tools=[tool]).tools == chat(tools=json.dumps([tool])).tools == (wanted,)
    for other in ({"type": "web_search", "name": "w"}, {"description": "no name"}):
        assert chat(tools=[other]).tools == (other,)


@pytest.mark.parametrize(("family", "template"), [("qwen3_vl", None), ("qwen3_5", None)])
def test_the_trained_text_is_that_of_tool_calls(
    family: str,
    template: str | None,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the front door: three spellings of one sample."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    result = {"from": "observation", "value": "<image>"}
    spellings = [
        [QUESTION, call_turn(CROP), result, ANSWER],
        [QUESTION, call_turn(CROP, "tool_call"), {**result, "from": "tool_response"}, ANSWER],
        [QUESTION, assistant(CROP), {"role": "tool", "content": "<image>"}, ANSWER],
    ]
    records = [
        {"conversations": turns, "images": ["a.png", "b.png"], "tools": json.dumps([TOOL])} for turns in spellings
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = ["--annotation_path", str(tmp_path / "set.jsonl"), "--data_path", str(tmp_path), "--all"]
    model = ["--model_name_or_path", str(tiny_checkpoint(family, template)), "--json", str(tmp_path / "out.jsonl")]
    assert main([*data, *model]) == 0, capsys.readouterr().err
    first, *others = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(other == first for other in others)
    assert sum(label != -100 for label in first["labels"]) > 20
