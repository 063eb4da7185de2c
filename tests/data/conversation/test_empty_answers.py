"""An empty answer is a legitimate one: it is trained as its end of turn, by every template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.conversation.thoughts import is_empty_answer
from qwenvl.metrics.base import Case
from qwenvl.metrics.registry import METRICS
from tests.data.records import build, reason_of

QUESTION = {"from": "human", "value": "Read."}
TINY = [("qwen2_vl", None), ("qwen2_5_vl", None), ("qwen3_vl", None), ("qwen3_vl", "thinking"), ("qwen3_5", None)]
PUBLISHED = ["qwen2_5vl", "qwen3vl", "qwen3_5", "qwen3_5_small", "qwen3_6", "qwen3_8"]
TRIMS = ("thinking", "qwen3_5", "qwen3_6", "qwen3_8")
"""In the names of templates that take white space off, and think."""


@pytest.fixture(scope="module", params=[*TINY, *PUBLISHED], ids=str)
def template(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> tuple[ChatTemplate, bool]:
    """Return a template and whether it takes white space off; the published ones where the machine has them."""
    if isinstance(request.param, tuple):
        folder = tiny_checkpoint(*request.param)
    else:
        folder = request.getfixturevalue("shared_folder") / "processors" / request.param
    return ChatTemplate(AutoProcessor.from_pretrained(folder)), any(name in str(request.param) for name in TRIMS)


@pytest.mark.parametrize("empty", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_an_empty_answer_is_trained_as_its_end_of_turn(template: tuple[ChatTemplate, bool], empty: Any) -> None:
    chat, trims = template
    conversation = build({"conversations": [QUESTION, {"from": "gpt", "value": empty}]})
    assert is_empty_answer(conversation.messages[1])
    rendering = chat.render(conversation)
    ((start, stop),) = rendering.spans
    written = "<think>\n\n</think>\n\n" if trims else empty if isinstance(empty, str) else ""
    assert rendering.text[start:stop] == written + "<|im_end|>\n"
    assert rendering.text[:start].endswith(chat.header)


def test_between_others_each_answer_keeps_its_own_end(template: tuple[ChatTemplate, bool]) -> None:
    chat, _ = template
    texts = ["one", "", "three"]
    turns = [turn for text in texts for turn in (QUESTION, {"from": "gpt", "value": text})]
    rendering = chat.render(build({"conversations": turns}))
    spans = [rendering.text[start:stop].rpartition("</think>\n\n")[2] for start, stop in rendering.spans]
    assert spans == [text + "<|im_end|>\n" for text in texts]


def test_a_tool_may_answer_nothing() -> None:
    call = {"from": "function_call", "value": '{"name": "press"}'}
    turns = [QUESTION, call, {"from": "observation", "value": ""}, {"from": "gpt", "value": "Done."}]
    assert build({"conversations": turns}).messages[2].parts == ()


def test_what_is_not_there_is_not_empty() -> None:
    """Null and a missing key are a mistake; a thought or a call is not nothing."""
    for turn in ({"from": "gpt", "value": None}, {"from": "gpt"}):
        assert "neither text nor media" in reason_of({"conversations": [QUESTION, turn]}, "bad_record")
    for turn in ({"reasoning": "hm"}, {"tool_calls": [{"name": "f"}]}, {"loss": False}, {"value": "<think>x</think>"}):
        full = {"from": "gpt", "value": "", **turn}
        conversation = build({"conversations": [QUESTION, {"from": "gpt", "value": "A"}, QUESTION, full]})
        assert not is_empty_answer(conversation.messages[-1])
    assert not is_empty_answer(build({"conversations": [QUESTION, {"from": "gpt", "value": "A"}]}).messages[1])


@pytest.mark.parametrize("name", ["exact_match", "relaxed_match", "anls", "bleu", "chrf"])
def test_nothing_is_right_where_nothing_is_expected(name: str) -> None:
    for prediction, value in (("", 1), (" \n", 1), ("words", 0)):
        assert METRICS[name].score(Case("Read.", ("",), prediction)).value == value
    assert METRICS[name].score(Case("Read.", ("words",), "")).value == 0
