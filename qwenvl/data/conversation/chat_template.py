"""Messages to text through the checkpoint's own chat template, with the stretches that are trained.

Where each turn ends is read from the rendering itself. Conversations of one form (speakers, and where media stand) are
mostly rendered alike: what the template writes around their texts is found once. Where the template provably writes
these texts as they are, that is the rendering; where it may look into them, it renders every sample, and where its
rendering is explained to the last character, the places of the texts are known. Otherwise every turn's text gets a
marker character (:mod:`qwenvl.data.conversation.turn_marks`), and the template is rendered a second time: the two must
agree once the markers are taken out. Words that users type (``assistant``, ``<|im_end|>``, whole fake turns) cannot
move a border.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import transformers

from qwenvl.data.conversation.template_texts import HOLE, writes_texts_as_they_are
from qwenvl.data.conversation.thoughts import with_thought_apart, writes_thought
from qwenvl.data.conversation.tool_calls import advice_on_calls, stand_ins
from qwenvl.data.conversation.turn_marks import (
    as_template_message,
    ends_of_turns,
    function_call,
    has_call_mark,
    unused_character,
)
from qwenvl.data.types import Conversation, Message, Part, Role, TextPart
from qwenvl.utils.errors import SampleError, UserError

_ANSWER = "\ue000"  # of a conversation that is rendered to see what the template writes around it
_MOST_FORMS = 10_000

_Form = tuple[tuple[Role, tuple[type | str, ...]], ...]


class ChatProcessor(Protocol):
    """The part of a transformers processor that rendering needs."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render a conversation."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation.

    Args:
        text: what the chat template makes of it; one placeholder token a picture or video.
        spans: (start, stop) in characters of what is trained: the text and calls of every assistant turn that is,
            its end-of-turn token and the newline after it.
        thoughts_left_out: which trained answers, counted from 1, have a thought that the template leaves out.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    thoughts_left_out: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template writes around the texts of conversations of one form.

    Args:
        literals: before, between and after the texts; nothing where that cannot be told, as with tools and calls.
        certain: whatever the texts say.
    """

    literals: tuple[str, ...]
    certain: bool


_NO_FRAME = _Frame((), False)


class ChatTemplate:
    """The chat template of one checkpoint.

    Args:
        processor: opened from the checkpoint's folder.
        template_kwargs: further arguments of the template, such as ``add_vision_id`` or ``enable_thinking``.

    Raises:
        UserError: the processor has no chat template, or not one whose assistant turns have a header and an end.
    """

    def __init__(self, processor: ChatProcessor, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._processor = processor
        self.kwargs = dict(template_kwargs or {})
        self._frames: dict[_Form, _Frame] = {}
        question = {"role": "user", "content": "Q"}
        prompt = self._render([question])
        opening = self._render([question], add_generation_prompt=True)
        answered = self._render([question, {"role": "assistant", "content": _ANSWER}])
        if not opening.startswith(prompt) or _ANSWER not in answered or "\n" not in opening[len(prompt) :]:
            raise UserError("The checkpoint's chat template has no assistant header, so that labels cannot be placed.")
        generation_prompt = opening[len(prompt) :]
        self.header = generation_prompt[: generation_prompt.index("\n") + 1]
        self.turn_end = answered[answered.index(_ANSWER) + len(_ANSWER) :]
        self.opens_thinking = "<think>" in generation_prompt and "</think>" not in generation_prompt
        if not self.turn_end:
            raise UserError(
                "The checkpoint's chat template does not end an assistant turn, so labels cannot be placed."
            )

    def render(self, conversation: Conversation) -> Rendering:
        """Render a conversation and find what is trained in it.

        Raises:
            SampleError: the template refuses the conversation, or changes it so that its turns cannot be told apart.
        """
        conversation = self.with_thoughts_apart(conversation)
        frame = self._frame(conversation)
        text, ends = _fill_in(frame, conversation)
        if not frame.certain:
            rendered = self._render_whole(conversation)
            if rendered != text:
                text, ends = rendered, self._ends_by_markers(rendered, conversation)
        spans = self._spans(text, conversation.messages, ends)
        answers = [message for message in conversation.messages if message.role == "assistant"]
        written = iter(text[start:stop] for start, stop in spans)
        trained = [(number, one, next(written)) for number, one in enumerate(answers, start=1) if one.trained]
        left_out = (number for number, one, words in trained if not writes_thought(one, words))
        return Rendering(text, spans, tuple(left_out))

    def render_prompt(self, conversation: Conversation) -> Rendering:
        """Render a conversation with the header of the answer that is to come; nothing in it is trained.

        Raises:
            SampleError: the template refuses the conversation.
        """
        conversation = self.with_thoughts_apart(conversation)
        return Rendering(self._render_whole(conversation, add_generation_prompt=True), ())

    def identity(self) -> list[Any]:
        """Return everything that renderings depend on, as values that JSON can hold."""
        processor: Any = self._processor
        templates = [getattr(part, "chat_template", None) for part in (processor, processor.tokenizer)]
        return [templates, processor.tokenizer.special_tokens_map, self.kwargs, transformers.__version__]

    def thinking_mismatch(self, conversation: Conversation) -> bool:
        """Whether the last answer has a ``<think>`` block the template does not open, or lacks the one it opens."""
        answer = next(message for message in reversed(conversation.messages) if message.role == "assistant")
        thinks = "<think>" in answer.text or bool(answer.extra.get("reasoning_content"))
        return thinks != self.opens_thinking

    @cached_property
    def _doubles_thoughts(self) -> bool:
        """Whether the template reads thoughts from ``reasoning_content`` alone, and takes ``<think>`` for words."""
        question = {"role": "user", "content": "Q"}
        inside = {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}
        apart = {"role": "assistant", "content": "A", "reasoning_content": "R"}
        written = self._render([question, apart])
        return "R" in written.removeprefix(self._render([question])) and written != self._render([question, inside])

    def with_thoughts_apart(self, conversation: Conversation) -> Conversation:
        """Return a conversation with the thoughts in front of its answers where the template reads them."""
        if not any(message.role == "assistant" and "<think>" in message.text for message in conversation.messages):
            return conversation
        if not self._doubles_thoughts:
            return conversation
        return replace(conversation, messages=tuple(map(with_thought_apart, conversation.messages)))

    def _frame(self, conversation: Conversation) -> _Frame:
        """Return what the template writes around the texts of conversations of this form."""
        messages = conversation.messages
        if conversation.tools or any(message.extra for message in messages):
            return _NO_FRAME
        form = tuple((message.role, tuple(_kind(part) for part in message.parts)) for message in messages)
        frame = self._frames.get(form)
        if frame is None:
            frame = self._find_frame(_emptied(conversation))
            if len(self._frames) < _MOST_FORMS:
                self._frames[form] = frame
        return frame

    def _find_frame(self, emptied: Conversation) -> _Frame:
        holes = sum(part == TextPart(HOLE) for message in emptied.messages for part in message.parts)
        try:
            written = self._render_messages(emptied, None)
        except SampleError:  # without its texts the template refuses it
            return _NO_FRAME
        literals = tuple(written.split(HOLE))
        if len(literals) != holes + 1:
            return _NO_FRAME
        processor: Any = self._processor
        template = getattr(processor, "chat_template", None)
        own = inspect.signature(processor.apply_chat_template).parameters  # which do more than tell the template
        if not isinstance(template, str) or any(name in own for name in self.kwargs):
            return _Frame(literals, False)
        variables = {"tools": None, "documents": None, "add_generation_prompt": False}
        variables |= {**processor.tokenizer.special_tokens_map, **self.kwargs}
        messages = [as_template_message(message, None) for message in emptied.messages]
        return _Frame(literals, writes_texts_as_they_are(template, messages, variables, written))

    def _render_whole(self, conversation: Conversation, **kwargs: Any) -> str:
        """Render a conversation, and see to it that its system turns, tools, calls and thoughts are written."""
        if any(message.role == "system" for message in conversation.messages[1:]):
            self._require_system_turns(conversation, **kwargs)
        rendered = self._render_messages(conversation, None, **kwargs)
        if conversation.tools or any(message.extra for message in conversation.messages):
            changed = stand_ins(conversation, rendered)
            if changed.wanted:
                changed.require_written(self._render_messages(changed.conversation, None, **kwargs))
        return rendered

    def _require_system_turns(self, conversation: Conversation, **kwargs: Any) -> None:
        """Check that the template takes and writes the system turns that are not first.

        Raises:
            SampleError: it does not.
        """
        first, *others = conversation.messages
        mark = TextPart(unused_character(conversation))
        for place, late in enumerate(others):
            if late.role != "system":
                continue
            marked = [first, *others[:place], replace(late, parts=(mark,)), *others[place + 1 :]]
            try:
                written = self._render_messages(replace(conversation, messages=tuple(marked)), None, **kwargs)
            except SampleError:
                self._render_messages(_without_late_system_turns(conversation), None, **kwargs)  # another reason
                raise SampleError("template", _late_system_turn(late, "refuses")) from None
            if mark.text not in written:
                raise SampleError("template", _late_system_turn(late, "leaves out"))

    def _ends_by_markers(self, text: str, conversation: Conversation) -> list[int | None]:
        """Return where what each turn says ends, white space behind it left out; None where that is nothing."""
        marker = unused_character(conversation)
        call = self._one_more_call(marker) if any(map(has_call_mark, conversation.messages)) else ""
        marked = self._render_messages(conversation, marker)
        plain, ends = ends_of_turns(marked, marker, call, conversation.messages)
        if plain != text:
            raise SampleError(
                "template",
                "the checkpoint's chat template rewrites the text of this sample, so that it cannot be told where its "
                "turns end. Look at the rendered text with tools/show_sample.py and reword or remove the sample.",
            )
        return ends

    def _one_more_call(self, name: str) -> str:
        """Return what the template writes behind the calls of an answer for one more of them.

        Raises:
            SampleError: that cannot be told.
        """
        question, calls = Message("user", (TextPart("Q"),)), [function_call("f"), function_call(name)]
        fewer, more = (
            self._render_messages(
                Conversation((question, Message("assistant", (TextPart("A"),), {"tool_calls": calls[:n]}))), None
            ).removesuffix(self.turn_end)
            for n in (1, 2)
        )
        added = more.removeprefix(fewer)
        if added == more or name not in added:
            raise SampleError("template", "the checkpoint's chat template does not write calls one after the other.")
        return added

    def _spans(self, text: str, messages: Sequence[Message], ends: Sequence[int | None]) -> tuple[tuple[int, int], ...]:
        """Return the trained stretches; ``ends`` is where what each turn says ends, None where that is nothing."""
        spans = []
        cursor = 0
        for message, end in zip(messages, ends, strict=True):
            if message.role == "assistant":
                start = text.find(self.header, cursor) + len(self.header)
                stop = text.find(self.turn_end, start if end is None else end)
                if end is None and self.turn_end.strip() in message.extra.get("reasoning_content", ""):
                    reason = f"a thought without an answer holds {self.turn_end.strip()}, which would end it."
                    raise SampleError("template", f"{reason} Reword it, or write the answer.")
                if start < len(self.header) or stop < 0:
                    raise SampleError("template", "the checkpoint's chat template leaves out an answer of this sample.")
                cursor = stop + len(self.turn_end)
                if message.trained:
                    spans.append((start, cursor))
            elif end is not None:
                cursor = end
        return tuple(spans)

    def _render_messages(self, conversation: Conversation, marker: str | None, **kwargs: Any) -> str:
        messages = [as_template_message(message, marker) for message in conversation.messages]
        tools = [dict(tool) for tool in conversation.tools] or None
        try:
            return self._render(messages, tools=tools, **kwargs)
        except Exception as error:  # templates raise whatever their author chose (jinja2, TypeError, ...)
            said = str(error).strip().rstrip(".") or type(error).__name__
            advice = advice_on_calls(conversation)
            raise SampleError(
                "template", f"the checkpoint's chat template refuses this sample: {said}.{advice}"
            ) from error

    def _render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        try:
            rendered = self._processor.apply_chat_template(list(messages), tokenize=False, **kwargs, **self.kwargs)
        except ValueError as error:
            if "chat_template" not in str(error) and "chat template" not in str(error):
                raise
            raise UserError(
                "The checkpoint's processor has no chat template. Copy the original checkpoint's chat_template.jinja "
                "or chat_template.json into its folder."
            ) from error
        return str(rendered)


def _fill_in(frame: _Frame, conversation: Conversation) -> tuple[str, list[int | None]]:
    """Return the texts of a conversation within their frame, and where that of every turn ends; None without text."""
    if not frame.literals:
        return "", []
    following = iter(frame.literals)
    written = [next(following)]
    place, ends = len(written[0]), list[int | None]()
    for message in conversation.messages:
        end = None
        for part in message.parts:
            if isinstance(part, TextPart) and part.text:
                written += [part.text, next(following)]
                end = place + len(part.text)
                place = end + len(written[-1])
        ends.append(end)
    return "".join(written), ends


def _without_late_system_turns(conversation: Conversation) -> Conversation:
    first, *others = conversation.messages
    return replace(conversation, messages=(first, *(message for message in others if message.role != "system")))


def _late_system_turn(turn: Message, verb: str) -> str:
    """Return what there is to say of a system turn that is not first."""
    return (
        f"the checkpoint's chat template {verb} the system turn {reprlib.repr(turn.text)}, which is not the first "
        "turn. Put all that the system says into one system turn at the start, or write it into a user turn."
    )


def _kind(part: Part) -> type | str:
    """Return what decides of a part how it is rendered, its text apart: an empty one is none."""
    return type(part) if not isinstance(part, TextPart) or part.text else ""


def _emptied(conversation: Conversation) -> Conversation:
    """Return the conversation with a hole for every text."""
    hole = TextPart(HOLE)
    return Conversation(
        tuple(
            replace(message, parts=tuple(hole if _kind(part) is TextPart else part for part in message.parts))
            for message in conversation.messages
        )
    )
