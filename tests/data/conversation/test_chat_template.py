"""Conversations rendered as a whole: where each turn ends is found by markers, whatever users type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from qwenvl.data.conversation.chat_template import ChatTemplate, Rendering
from qwenvl.data.conversation.turn_marks import as_template_message
from qwenvl.data.types import Conversation, ImageItem, Message, Part, TextPart, VideoItem
from qwenvl.utils.errors import SampleError, UserError

TEMPLATES = [("qwen2_vl", None), ("qwen3_vl", None), ("qwen3_vl", "thinking"), ("qwen3_5", None)]


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


def test_the_marker_of_a_turn_leaves_its_tool_response_one(tiny_checkpoint: Callable[..., Path]) -> None:
    """This template takes a user's turn that ends with the tag for a tool's, and keeps the thoughts before it."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl", "thinking"))
    first, second = "<think>\nlook\n</think>\n\nA", "<think>\nso\n</think>\n\nB"
    for response in ("<tool_response>\nx\n</tool_response>", "<tool_response>\nx\n</tool_response>\n"):
        texts = [("user", "Q"), ("assistant", first), ("user", response.strip()), ("assistant", second)]
        conversation = Conversation(tuple(Message(role, (TextPart(text),)) for role, text in texts))  # type: ignore[arg-type]
        rendering = ChatTemplate(processor).render(conversation)
        trained = [rendering.text[start:stop] for start, stop in rendering.spans]
        assert trained == [f"{first}<|im_end|>\n", f"{second}<|im_end|>\n"]


def ask_and_answer(*texts: str) -> Conversation:
    """Return a conversation in which the user and the assistant say the texts in turn."""
    turns = enumerate(texts)
    return Conversation(tuple(Message("assistant" if n % 2 else "user", (TextPart(text),)) for n, text in turns))


def trained_of(rendering: Rendering) -> list[str]:
    return [rendering.text[start:stop] for start, stop in rendering.spans]


def test_answers_whose_thoughts_the_template_leaves_out_are_found(tiny_checkpoint: Callable[..., Path]) -> None:
    """The prompt opens a thought, and the header of an answer is what stands before it."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl", "thinking"))
    conversation = ask_and_answer("1", "<think>\nfirst\n</think>\n\none", "2", "<think>\nsecond\n</think>\n\ntwo")
    template = ChatTemplate(processor)
    assert template.header == "<|im_start|>assistant\n"
    assert template.opens_thinking
    trained = ["one<|im_end|>\n", "<think>\nsecond\n</think>\n\ntwo<|im_end|>\n"]
    assert trained_of(template.render(conversation)) == trained


def test_a_prompt_ends_with_the_header_of_the_answer(processor: Any) -> None:
    question = Conversation((Message("user", (ImageItem("a.png"), TextPart("Q"))),))
    content = [{"type": "image"}, {"type": "text", "text": "Q"}]
    stock = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert ChatTemplate(processor).render_prompt(question) == Rendering(stock, ())
    assert stock.endswith(("<|im_start|>assistant\n", "<think>\n"))


@given(conversation=conversations(), numbered=st.booleans())
def test_prompts_are_what_the_processor_itself_renders(
    processor: Any, conversation: Conversation, numbered: bool
) -> None:
    """Media, thoughts and template arguments included; most of them are rendered without its function."""
    template = ChatTemplate(processor, {"add_vision_id": numbered})
    written = [as_template_message(one, None) for one in template.with_thoughts_apart(conversation).messages]
    stock = processor.apply_chat_template(written, add_generation_prompt=True, add_vision_id=numbered)
    assert template.render_prompt(conversation).text == stock


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize("style", ["plain", 3, None, ["a", {"b": None}]])
def test_a_template_is_given_what_the_processor_gives_it(
    processor: Any, style: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    besides = "{{ eos_token }} {{ tools is none }} {{ documents is none }} {{ style }}\n"
    monkeypatch.setattr(processor, "chat_template", besides + TURNS + HEADER)
    prompt = ChatTemplate(processor, {"style": style}).trained_turns(ask_and_answer("Q", "A"))[0].prompt
    stock = [{"role": "user", "content": "Q"}]
    assert prompt == processor.apply_chat_template(stock, add_generation_prompt=True, style=style)
    assert prompt.startswith(f"<|im_end|> True True {style}\n")


def test_thoughts_reach_a_template_by_every_name_that_the_processor_gives_them(
    processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "chat_template", TURNS.replace("m.content", "m.thinking or m.content") + HEADER)
    answer = Message("assistant", (TextPart("A"),), {"reasoning_content": "so"})
    question = Message("user", (TextPart("Q"),))
    stock = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "so"}]
    expected = processor.apply_chat_template(stock, add_generation_prompt=True)
    conversation = Conversation((question, answer))
    if "so" in expected:
        assert ChatTemplate(processor).render_prompt(conversation).text == expected
    else:  # older transformers give a template one name
        with pytest.raises(SampleError, match="leaves out the thought"):
            ChatTemplate(processor).render_prompt(conversation)


def test_a_processor_with_a_function_of_its_own_is_asked(processor: Any) -> None:
    class Shouting:
        chat_template, tokenizer = processor.chat_template, processor.tokenizer

        def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
            return processor.apply_chat_template(conversation, **kwargs).replace("softly", "LOUDLY")

    question = Conversation((Message("user", (TextPart("Say softly"),)),))
    assert "Say LOUDLY" in ChatTemplate(Shouting()).render_prompt(question).text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TURNS, "has no assistant header"),
        (TURNS + "{% if add_generation_prompt %}Assistant:{% endif %}", "has no assistant header"),
        ("{% if add_generation_prompt %}New\n{% endif %}" + TURNS, "has no assistant header"),
        (TURNS.replace("m.content", "'X'") + HEADER, "has no assistant header"),
        (TURNS.replace("END", "") + HEADER, "does not end an assistant turn"),
        (None, "has no chat template. Copy the original checkpoint's"),
    ],
)
def test_templates_that_do_not_tell_answers_apart_are_refused(
    processor: Any, template: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(UserError, match=said):
        ChatTemplate(processor)


def test_errors_that_are_not_about_the_template_stay_what_they_are() -> None:
    class Broken:
        def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
            raise ValueError("no such argument")

    with pytest.raises(ValueError, match="no such argument") as caught:
        ChatTemplate(Broken())
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("m.content[:5]", "rewrites the text of this sample"),  # what follows is gone, and the marker with it
        ("m.content | upper", None),
        ("m.content | replace('e', m.content | length | string)", "rewrites the text of this sample"),
        ("m.content * (m.content | length < 9)", "rewrites the text of this sample"),
        ("raise_exception('no')", "refuses this sample: no"),
    ],
)
def test_a_template_that_rewrites_texts_is_used_where_turns_can_be_told_apart(
    processor: Any, body: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"({body}) if 'Who' in messages[0].content else m.content"
    monkeypatch.setattr(processor, "chat_template", TURNS.replace("m.content", body) + HEADER)
    template = ChatTemplate(processor)
    conversation = ask_and_answer("Who is there?", "Petereee")
    if said is None:
        assert trained_of(template.render(conversation)) == ["PETEREEEEND"]
        return
    with pytest.raises(SampleError, match=said) as caught:
        template.render(conversation)
    assert caught.value.category == "template"


@pytest.mark.parametrize(
    "parts",
    [
        (TextPart("See"), ImageItem("a.png")),
        (ImageItem("a.png"), TextPart("See "), TextPart("this"), VideoItem("a.mp4"), ImageItem("b.png")),
        (ImageItem("a.png"),),
        (TextPart("See "), TextPart("this")),
    ],
)
def test_turns_that_end_with_media_are_marked_behind_their_last_text(processor: Any, parts: tuple[Part, ...]) -> None:
    turns = Message("user", parts), Message("assistant", (TextPart("Yes."),))
    conversation = Conversation((*turns, Message("user", (*parts, *parts)), Message("assistant", (TextPart("No."),))))
    by_markers = ChatTemplate(processor).render(conversation)
    assert by_markers == ChatTemplate(processor).render(conversation)
    assert trained_of(by_markers)[0].removeprefix("<think>\n\n</think>\n\n") == "Yes.<|im_end|>\n"


def test_markers_are_characters_that_nobody_typed(processor: Any) -> None:
    conversation = ask_and_answer("\ue000?", "\ue001 \ue003", "again", "\ue002")
    rendering = ChatTemplate(processor).render(conversation)
    assert rendering == ChatTemplate(processor).render(conversation)
    assert trained_of(rendering)[0].endswith("\ue001 \ue003<|im_end|>\n")
    everything = "".join(chr(code) for code in range(0xE000, 0xE100))
    with pytest.raises(SampleError, match="every character of the private use area"):
        ChatTemplate(processor).render(ask_and_answer("Q", everything))
