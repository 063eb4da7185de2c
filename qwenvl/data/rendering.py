"""Messages to text through the checkpoint's own chat template, with the stretches that are trained.

Where each turn ends is read from the rendering itself. Conversations of one form (speakers, and where media stand) are
mostly rendered alike: what the template writes around their texts is found once. Where the template provably writes
these texts as they are, that is the rendering; where it may look into them, it renders every sample, and where its
rendering is explained to the last character, the places of the texts are known. Otherwise every turn's text gets a
marker character, and the template is rendered a second time: the two must agree once the markers are taken out. Words
that users type (``assistant``, ``<|im_end|>``, whole fake turns) cannot move a border.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import transformers

from qwenvl.data.template_texts import HOLE, writes_texts_as_they_are
from qwenvl.data.types import Conversation, ImageItem, Message, Part, Role, TextPart
from qwenvl.utilities.errors import SampleError, UserError

_TOOL_RESPONSE_END = "</tool_response>"
_ANSWER = "\ue000"  # of a conversation that is rendered to see what the template writes around it
_MOST_FORMS = 10_000
_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xE100)]

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
        spans: (start, stop) in characters of what is trained: every assistant turn's text, its end-of-turn token and
            the newline after it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


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
        frame = self._frame(conversation)
        text, ends = _fill_in(frame, conversation)
        if not frame.certain:
            rendered = self._render_messages(conversation, None)
            if rendered != text:
                text, ends = rendered, self._ends_by_markers(rendered, conversation)
        return Rendering(text, self._spans(text, conversation.messages, ends))

    def render_prompt(self, conversation: Conversation) -> Rendering:
        """Render a conversation with the header of the answer that is to come; nothing in it is trained.

        Raises:
            SampleError: the template refuses the conversation.
        """
        return Rendering(self._render_messages(conversation, None, add_generation_prompt=True), ())

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
        messages = [_as_template_message(message, None) for message in emptied.messages]
        return _Frame(literals, writes_texts_as_they_are(template, messages, variables, written))

    def _ends_by_markers(self, text: str, conversation: Conversation) -> list[int]:
        """Return where the text of every turn that has any ends, white space behind it left out."""
        marker = _unused_character(conversation)
        marked = self._render_messages(conversation, marker)
        has_marker = [bool(message.text) for message in conversation.messages]
        if marked.replace(marker, "") != text or marked.count(marker) != sum(has_marker):
            raise SampleError(
                "template",
                "the checkpoint's chat template rewrites the text of this sample, so that it cannot be told where its "
                "turns end. Look at the rendered text with tools/show_sample.py and reword or remove the sample.",
            )
        return _marker_positions(marked, marker)

    def _spans(self, text: str, messages: Sequence[Message], ends: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return the trained stretches; ``ends`` are the ends of the texts of the turns that have text."""
        spans = []
        remaining = iter(ends)
        cursor = 0
        for message in messages:
            text_end = next(remaining) if message.text else None
            if message.role == "assistant":
                start = text.find(self.header, cursor) + len(self.header)
                stop = text.find(self.turn_end, start if text_end is None else text_end)
                if start < len(self.header) or stop < 0:
                    raise SampleError("template", "the checkpoint's chat template leaves out an answer of this sample.")
                spans.append((start, stop + len(self.turn_end)))
                cursor = spans[-1][1]
            elif text_end is not None:
                cursor = text_end
        return tuple(spans)

    def _render_messages(self, conversation: Conversation, marker: str | None, **kwargs: Any) -> str:
        messages = [_as_template_message(message, marker) for message in conversation.messages]
        tools = [dict(tool) for tool in conversation.tools] or None
        try:
            return self._render(messages, tools=tools, **kwargs)
        except Exception as error:  # templates raise whatever their author chose (jinja2, TypeError, ...)
            raise SampleError("template", f"the checkpoint's chat template refuses this sample: {error}") from error

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


def _as_template_message(message: Message, marker: str | None) -> dict[str, Any]:
    """Return the turn as chat templates take it; with ``marker`` after the last of its text."""
    last_text = max((i for i, part in enumerate(message.parts) if isinstance(part, TextPart)), default=-1)
    content: list[dict[str, Any]] = []
    for index, part in enumerate(message.parts):
        if isinstance(part, TextPart):
            text = part.text if marker is None or index != last_text or not message.text else _mark(part.text, marker)
            content.append({"type": "text", "text": text})
        else:
            content.append({"type": "image" if isinstance(part, ImageItem) else "video"})
    only_text = all(item["type"] == "text" for item in content)
    # A plain string is what templates handle best: some look into it for <think> and tool responses.
    body: Any = "".join(item["text"] for item in content) if only_text else content
    return {"role": message.role, "content": body, **message.extra}


def _fill_in(frame: _Frame, conversation: Conversation) -> tuple[str, list[int]]:
    """Return the texts of a conversation within their frame, and where that of every turn that has any ends."""
    if not frame.literals:
        return "", []
    following = iter(frame.literals)
    written = [next(following)]
    place, end, ends = len(written[0]), 0, []
    for message in conversation.messages:
        for part in message.parts:
            if isinstance(part, TextPart) and part.text:
                written += [part.text, next(following)]
                end = place + len(part.text)
                place = end + len(written[-1])
        if message.text:
            ends.append(end)
    return "".join(written), ends


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


def _mark(text: str, marker: str) -> str:
    """Put the marker after the text, but before what templates look for there: white space, a closing tag."""
    stripped = text.rstrip()
    if stripped.endswith(_TOOL_RESPONSE_END):
        stripped = stripped[: -len(_TOOL_RESPONSE_END)]
    return stripped + marker + text[len(stripped) :]


def _marker_positions(marked: str, marker: str) -> list[int]:
    """Return where the markers stand, as indices into the text without markers."""
    pieces = marked.split(marker)
    positions, total = [], 0
    for piece in pieces[:-1]:
        total += len(piece)
        positions.append(total)
    return positions


def _unused_character(conversation: Conversation) -> str:
    """Return a character of the private use area that the conversation does not contain."""
    extras = [[message.text, dict(message.extra)] for message in conversation.messages]
    everything = json.dumps([extras, [dict(tool) for tool in conversation.tools]], ensure_ascii=False, default=str)
    for character in _PRIVATE_USE:
        if character not in everything:
            return character
    raise SampleError("bad_record", "the text uses every character of the private use area U+E000 to U+E0FF.")
