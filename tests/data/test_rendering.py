"""Where turns end, found from the form of a conversation, is where markers find it; and one rendering is enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from qwenvl.data.rendering import _NO_FRAME, ChatTemplate, Rendering
from qwenvl.data.types import Conversation, ImageItem, Message, Part, TextPart, VideoItem
from qwenvl.utilities.errors import SampleError

TEMPLATES = [("qwen2_vl", None), ("qwen3_vl", None), ("qwen3_vl", "thinking"), ("qwen3_5", None)]


class ByMarkers(ChatTemplate):
    """Knows no forms, so that every conversation is rendered, and once more with markers."""

    def _frame(self, conversation: Conversation) -> Any:
        return _NO_FRAME


@pytest.fixture(scope="module", params=TEMPLATES, ids=str)
def processor(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Any:
    return AutoProcessor.from_pretrained(tiny_checkpoint(*request.param))


words = st.text("a \n.") | st.sampled_from(
    ["assistant", "<|im_end|>", "<|im_end|>\n", "<think>\nso\n</think>\n\nYes", "</tool_response>", "\ue000", "\n\nA"]
)
texts = st.lists(words, min_size=1, max_size=3).map("".join).filter(bool)
text_parts = texts.map(TextPart)
media = st.sampled_from([ImageItem("a.png"), VideoItem("a.mp4")])
questions: st.SearchStrategy[tuple[Part, ...]] = st.lists(text_parts | media, min_size=1, max_size=3).map(tuple)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = [Message("system", (draw(text_parts),))] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(questions)), Message("assistant", (draw(text_parts),))]
    return Conversation(tuple(messages))


def rendered(template: ChatTemplate, conversation: Conversation) -> Rendering | str:
    try:
        return template.render(conversation)
    except SampleError as error:
        return str(error)


@given(conversations())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_forms_and_markers_find_the_same(processor: Any, conversation: Conversation) -> None:
    by_markers = rendered(ByMarkers(processor), conversation)
    by_form = rendered(ChatTemplate(processor), conversation)
    assert by_form == by_markers or isinstance(by_markers, str)


def test_a_template_that_does_not_look_into_texts_renders_a_form_once(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering would be a good part of counting; the official template never looks into the texts."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl"))
    template, calls = ChatTemplate(processor), []
    render = processor.apply_chat_template
    monkeypatch.setattr(processor, "apply_chat_template", lambda *a, **k: calls.append(1) or render(*a, **k))
    for number in range(5):
        turns = Message("user", (TextPart(f"{number}?"),)), Message("assistant", (TextPart(f"{number} \n"),))
        rendering = template.render(Conversation(turns))
        assert [rendering.text[start:stop] for start, stop in rendering.spans] == [f"{number} \n<|im_end|>\n"]
    assert len(calls) == 1


def test_the_marker_of_a_turn_leaves_its_tool_response_one(tiny_checkpoint: Callable[..., Path]) -> None:
    """This template takes a user's turn that ends with the tag for a tool's, and keeps the thoughts before it."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl", "thinking"))
    first, second = "<think>\nlook\n</think>\n\nA", "<think>\nso\n</think>\n\nB"
    for response in ("<tool_response>\nx\n</tool_response>", "<tool_response>\nx\n</tool_response>\n"):
        texts = [("user", "Q"), ("assistant", first), ("user", response.strip()), ("assistant", second)]
        conversation = Conversation(tuple(Message(role, (TextPart(text),)) for role, text in texts))  # type: ignore[arg-type]
        rendering = ByMarkers(processor).render(conversation)
        trained = [rendering.text[start:stop] for start, stop in rendering.spans]
        assert trained == [f"{first}<|im_end|>\n", f"{second}<|im_end|>\n"]
