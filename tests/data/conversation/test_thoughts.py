"""Thoughts in the text of an answer or beside it: one conversation, one trained text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.conversation.thoughts import split_thought, thought_of
from qwenvl.data.types import Message, TextPart
from tests.data.records import build, reason_of

PUBLISHED = ["qwen3_5", "qwen3_5_small", "qwen3_6", "qwen3_8"]
CALL = {"type": "function", "function": {"name": "search", "arguments": {"a": 1}}}
QUESTION = {"role": "user", "content": "q"}


def blind_to_think(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint, and let its template read thoughts from ``reasoning_content`` alone, as Qwen3.8's does."""
    shutil.copytree(checkpoint, folder)
    file = folder / "chat_template.jinja"
    template, looks = file.read_text(), "elif '</think>' in content"
    assert looks in template
    file.write_text(template.replace(looks, "elif false"))
    return folder


@pytest.fixture(scope="module", params=[("qwen3_vl", "thinking"), ("qwen3_5", None), "blind", *PUBLISHED], ids=str)
def template(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> ChatTemplate:
    """Return a template that writes thoughts; the published ones where the machine has them."""
    if request.param == "blind":
        folder = blind_to_think(tiny_checkpoint("qwen3_vl", "thinking"), tmp_path_factory.mktemp("blind") / "model")
        return ChatTemplate(AutoProcessor.from_pretrained(folder))
    if isinstance(request.param, tuple):
        return ChatTemplate(AutoProcessor.from_pretrained(tiny_checkpoint(*request.param)))
    folder: Path = request.getfixturevalue("shared_folder")
    return ChatTemplate(AutoProcessor.from_pretrained(folder / "processors" / request.param))


def trained(template: ChatTemplate, *turns: dict[str, Any]) -> list[str]:
    rendering = template.render(build({"messages": [QUESTION, *turns]}))
    return [rendering.text[start:stop] for start, stop in rendering.spans]


def answer(content: Any, **turn: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **turn}


def test_a_thought_in_the_text_is_a_thought_beside_it(template: ChatTemplate) -> None:
    inside = [
        answer("<think>\nlook it up\n</think>", tool_calls=[CALL]),
        {"role": "tool", "content": "r"},
        answer("<think>\nso\n</think>\n\nA"),
    ]
    apart = [
        answer("", reasoning_content="look it up", tool_calls=[CALL]),
        {"role": "tool", "content": "r"},
        answer("A", reasoning_content="so"),
    ]
    vllm = [{("reasoning" if key == "reasoning_content" else key): turn[key] for key in turn} for turn in apart]
    both = [{**turn, **other} for turn, other in zip(apart, inside, strict=True)]
    wanted = trained(template, *apart)
    assert trained(template, *inside) == wanted
    assert trained(template, *vllm) == wanted
    assert trained(template, *both) == wanted
    assert wanted[0].startswith("<think>\nlook it up\n</think>\n\n<tool_call>")
    assert wanted[1] == "<think>\nso\n</think>\n\nA<|im_end|>\n"


def test_one_thought_is_written_once(template: ChatTemplate) -> None:
    for text in ("<think>\nso\n</think>\n\nA", "<think>so</think>A", "\n<think>\n\nso</think>\nA"):
        (written,) = trained(template, answer(text))
        assert written == "<think>\nso\n</think>\n\nA<|im_end|>\n"
    (written,) = trained(template, answer("<think>\n\n</think>\n\nA"))
    assert written == "<think>\n\n</think>\n\nA<|im_end|>\n"


def test_a_template_without_thoughts_writes_the_text(tiny_checkpoint: Callable[..., Path]) -> None:
    template = ChatTemplate(AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl")))
    text = "<think>\nso\n</think>\n\nA"
    assert trained(template, answer(text)) == [text + "<|im_end|>\n"]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (answer("A", reasoning="x", reasoning_content="y"), "'reasoning_content' and 'reasoning', which differ"),
        (answer("A", reasoning={"effort": "low"}), "'reasoning' must be a string, not dict"),
        (answer("<think>x</think>A", reasoning_content="y"), "a <think> block in its text and another thought in"),
    ],
)
def test_two_thoughts_of_one_turn_are_refused(turn: dict[str, Any], expected: str) -> None:
    assert expected in reason_of({"messages": [QUESTION, turn]}, "bad_record")


def test_reasoning_that_says_nothing_more_is_taken() -> None:
    plain = build({"messages": [QUESTION, answer("A", reasoning_content="x")]})
    for turn in (
        answer("A", reasoning="x"),
        answer("A", reasoning="x", reasoning_content="x"),
        answer("A", reasoning="x", reasoning_content=""),
        answer("A", reasoning="", reasoning_content="x"),
        answer("<think>\nx\n</think>\n\nA", reasoning_content="x"),
    ):
        conversation = build({"messages": [QUESTION, turn]})
        assert conversation == plain and not conversation.unread_keys


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>\nx\n</think>\n\nA", ("x", "A")),
        (" <think></think>", ("", "")),
        ("A <think>x</think>", None),
        ("<think>x", None),
        ("x</think>A", ("x", "A")),
        ("<think>a</think>b<think>c</think>", None),
        ("<think>a</think>b</think>c", None),
        ("A", None),
    ],
)
def test_a_thought_stands_first_and_once(text: str, found: Any) -> None:
    assert split_thought(text) == found
    assert thought_of(Message("assistant", (TextPart(text),))) == (found[0] if found else "")
