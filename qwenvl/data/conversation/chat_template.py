"""Render messages with the checkpoint's own chat template: a prompt and a target for each trained answer.

The prompt of an answer is the text that a server makes of the turns before it: the template rendered with
``add_generation_prompt`` and the tools and template arguments of the sample. The target is the text that the model then
has to write: thought, closing tag, text, calls and end of turn. It is what the template adds to the prompt when the
answer is its last turn. Templates render earlier turns differently from how they were generated (they leave out
thoughts of earlier answers), so that each answer has a prompt of its own; :mod:`qwenvl.data.encoding.rows` makes
training rows of them. Text of users (``assistant``, ``<|im_end|>``, whole turns) cannot change the span of an answer.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import _compile_jinja_template  # the one that apply_chat_template renders

from qwenvl.data.conversation.thoughts import thought_of, with_thoughts_apart, writes_thought
from qwenvl.data.conversation.tool_calls import WAY_OUT, advice_on_calls, stand_ins
from qwenvl.data.conversation.turn_marks import (
    as_template_message,
    ends_of_turns,
    function_call,
    has_call_mark,
    unused_character,
)
from qwenvl.data.types import Conversation, Message, TextPart
from qwenvl.utils.errors import SampleError, UserError

THOUGHT = "reasoning_content"
_ANSWER = "\ue000"  # of conversations that are rendered to see what the template writes around an answer
SWITCH = "enable_thinking"
"""Template argument that turns thinking on and off, in the templates that have it."""
_NONE = {"tools": None, "documents": None, "add_generation_prompt": False}  # arguments that every template gets


@dataclass(frozen=True, slots=True)
class TrainedTurn:
    """One trained answer: the prompt that a server sends, and the target that the model has to write.

    Args:
        prompt: Rendered turns before the answer, with the generation prompt; one placeholder token per image or video.
        target: Rendered answer, including its end of turn and the newline after it.
        message: Index of the answer in the conversation's messages.
        arguments: Arguments that the template was rendered with.
        thought: Characters of the thought at the start of the target, closing tag included; 0 without a thought.
        weight: Factor of the loss of the target's tokens.
    """

    prompt: str
    target: str
    message: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    thought: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation, or the part of it that makes one training row.

    Args:
        text: Output of the chat template; one placeholder token per image or video.
        spans: (start, stop) in characters of each trained answer, with its end-of-turn token and the newline after it.
            The text is tokenized in pieces: each span on its own, as a server's model writes it.
        turns: Index in the conversation's messages of the answer of each span.
        arguments: Template arguments of each span.
        untrained: (start, stop) in characters of parts of spans that are not trained, such as a thought.
        thinks: Whether the answer of each span has a thought.
        weights: Factor of the loss of each span's tokens; empty where all are 1.
        whole: Whether the text is the whole conversation as rendered; servers may send other prompts for its answers.
        thoughts_left_out: Numbers, from 1, of answers with a thought that the template leaves out of the whole.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    turns: tuple[int, ...] = ()
    arguments: tuple[Mapping[str, Any], ...] = ()
    untrained: tuple[tuple[int, int], ...] = ()
    thinks: tuple[bool, ...] = ()
    weights: tuple[float, ...] = ()
    whole: bool = False
    thoughts_left_out: tuple[int, ...] = ()


class ChatTemplate:
    """The chat template of one checkpoint.

    Args:
        processor: Processor of the checkpoint's folder.
        template_kwargs: Further arguments of the template, such as ``add_vision_id`` or ``enable_thinking``.

    Attributes:
        header: Text that opens an answer.
        turn_end: Text that ends an answer, with the newline after it.
        writes_thoughts: Whether the template writes ``reasoning_content``.
        has_switch: Whether ``enable_thinking`` changes the prompt.
        opens_thinking: Whether the prompt opens a thought by default.

    Raises:
        UserError: The processor has no chat template, or one whose assistant turns have no header or no end.
    """

    def __init__(self, processor: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._processor = processor
        self._source = _template_source(processor)
        self._special = dict(processor.tokenizer.special_tokens_map) if self._source is not None else {}
        self.kwargs = dict(template_kwargs or {})
        question = {"role": "user", "content": "Q"}
        prompt = self._render([question])
        opening = self._render([question], add_generation_prompt=True)
        answered = self._render([question, {"role": "assistant", "content": _ANSWER}])
        if not opening.startswith(prompt) or _ANSWER not in answered or "\n" not in opening[len(prompt) :]:
            raise UserError("The checkpoint's chat template has no assistant header, so that labels cannot be placed.")
        generation_prompt = opening[len(prompt) :]
        self.header = generation_prompt[: generation_prompt.index("\n") + 1]
        self.turn_end = answered[answered.index(_ANSWER) + len(_ANSWER) :]
        self.opens_thinking = opens_thought(generation_prompt)
        thinker = {"role": "assistant", "content": "A", THOUGHT: _ANSWER}
        self.writes_thoughts = _ANSWER in self._render([question, thinker])
        self.has_switch = self._finds_switch(question)
        if not self.turn_end:
            raise UserError(
                "The checkpoint's chat template does not end an assistant turn, so labels cannot be placed."
            )

    def trained_turns(self, conversation: Conversation) -> list[TrainedTurn]:
        """Return the trained answers of a conversation, each with its own prompt, in order.

        Raises:
            SampleError: The template refuses the conversation or leaves out a part of it, or an answer cannot follow
                the prompt that a server would send.
        """
        conversation = self.with_thoughts_apart(conversation)
        self._require_written(conversation, self.arguments(conversation, _last_answer(conversation)))
        written = [as_template_message(message, None) for message in conversation.messages]
        indices = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
        return [self._trained_turn(conversation, written, n) for n in indices if conversation.messages[n].trained]

    def render(self, conversation: Conversation) -> Rendering:
        """Render a conversation as a whole, as the official recipe does: earlier turns as the template writes history.

        Raises:
            SampleError: The template refuses the conversation, or changes it so that the ends of turns cannot be found.
        """
        conversation = self.with_thoughts_apart(conversation)
        arguments = self.arguments(conversation, None)
        self._require_written(conversation, arguments)
        text = self._render_messages(conversation, None, arguments)
        return self._spans(text, conversation.messages, self._ends_by_markers(text, conversation, arguments), arguments)

    def render_prompt(self, conversation: Conversation) -> Rendering:
        """Render a conversation with the header of the next answer; nothing in it is trained.

        Raises:
            SampleError: The template refuses the conversation.
        """
        conversation = self.with_thoughts_apart(conversation)
        arguments = self.arguments(conversation, None)
        self._require_written(conversation, arguments, add_generation_prompt=True)
        return Rendering(self._render_messages(conversation, None, arguments, add_generation_prompt=True), ())

    def arguments(self, conversation: Conversation, answer: Message | None) -> dict[str, Any]:
        """Return the template arguments of an answer: those of the run, its dataset and its sample.

        ``enable_thinking`` is on for an answer with a thought and off for one without, where the template has the
        switch and nothing else is given.
        """
        arguments = {**self.kwargs, **conversation.template_kwargs}
        if arguments.get(SWITCH) == "auto":
            del arguments[SWITCH]
        if answer is not None and self.has_switch and SWITCH not in arguments:
            arguments[SWITCH] = bool(thought_of(answer))
        return arguments

    def with_thoughts_apart(self, conversation: Conversation) -> Conversation:
        """Return a conversation with thoughts apart from texts, where the template writes thoughts."""
        return with_thoughts_apart(conversation) if self.writes_thoughts else conversation

    def _finds_switch(self, question: dict[str, Any]) -> bool:
        """Return whether ``enable_thinking`` changes the prompt; a template that does not name it is not rendered."""
        if not any(SWITCH in str(template) for template in self._templates()):
            return False
        prompts = {self._render([question], add_generation_prompt=True, **{SWITCH: on}) for on in (True, False)}
        return len(prompts) == 2

    def _templates(self) -> list[Any]:
        parts = (self._processor, getattr(self._processor, "tokenizer", None))
        return [getattr(part, "chat_template", None) for part in parts]

    def identity(self) -> list[Any]:
        """Return everything that renderings depend on, as values that JSON can hold."""
        return [self._templates(), self._processor.tokenizer.special_tokens_map, self.kwargs, transformers.__version__]

    def thinking_mismatch(self, conversation: Conversation, whole: bool = False) -> bool:
        """Whether a trained answer has a thought that its prompt does not open, or lacks one that it opens.

        Args:
            conversation: Turns of the sample.
            whole: Whether it is trained as the template renders it, where only the last answer keeps its thought.
        """
        answers = [message for message in conversation.messages if message.role == "assistant"]
        chosen = answers[-1:] if whole else [message for message in answers if message.trained]
        if self.has_switch and not whole:
            return False
        return any(bool(thought_of(message)) != self.opens_thinking for message in chosen)

    def _trained_turn(self, conversation: Conversation, written: list[dict[str, Any]], index: int) -> TrainedTurn:
        answer = conversation.messages[index]
        arguments = self.arguments(conversation, answer)
        if not any(message.role != "system" for message in conversation.messages[:index]):
            raise SampleError(
                "template",
                "the conversation begins with an answer, which no server would ask for. Give that turn "
                '"loss": false, put the question before it, or use --history as_rendered.',
            )
        prompt = self._render_written(conversation, written[:index], arguments, add_generation_prompt=True)
        thought = thought_of(answer)
        whole = self._render_written(conversation, written[: index + 1], arguments)
        target = whole[len(prompt) :] if whole.startswith(prompt) else None
        if target is None and not thought and opens_thought(prompt[prompt.rindex(self.header) :]):
            marked = as_template_message(replace(answer, extra={**answer.extra, THOUGHT: _ANSWER}), None)
            whole = self._render_written(conversation, [*written[:index], marked], arguments)
            target = whole[len(prompt) :].replace(_ANSWER, "", 1) if whole.startswith(prompt) else None
        if target is None or thought not in target:
            raise SampleError("template", _no_continuation(thought, arguments))
        length = target.index(thought) + len(thought) if thought else 0
        end = _end_of_thought(target, length) if thought else 0
        return TrainedTurn(prompt, target, index, arguments, end, answer.weight)

    def _require_written(self, conversation: Conversation, arguments: Mapping[str, Any], **kwargs: Any) -> None:
        """Check that the template writes late system turns, tools, calls and the last thought of a conversation."""
        if any(message.role == "system" for message in conversation.messages[1:]):
            self._require_system_turns(conversation, arguments, **kwargs)
        if not conversation.tools and not any(message.extra for message in conversation.messages):
            return
        rendered = self._render_messages(conversation, None, arguments, **kwargs)
        changed = stand_ins(conversation, rendered)
        if changed.wanted:
            changed.require_written(self._render_messages(changed.conversation, None, arguments, **kwargs))

    def _require_system_turns(self, conversation: Conversation, arguments: Mapping[str, Any], **kwargs: Any) -> None:
        """Check that the template takes and writes the system turns that are not first.

        Raises:
            SampleError: The template does not.
        """
        first, *others = conversation.messages
        mark = TextPart(unused_character(conversation))
        for place, late in enumerate(others):
            if late.role != "system":
                continue
            marked = [first, *others[:place], replace(late, parts=(mark,)), *others[place + 1 :]]
            try:
                written = self._render_messages(
                    replace(conversation, messages=tuple(marked)), None, arguments, **kwargs
                )
            except SampleError:
                others_alone = _without_late_system_turns(conversation)
                self._render_messages(others_alone, None, arguments, **kwargs)  # raises where the reason is another one
                raise SampleError("template", _late_system_turn(late, "refuses")) from None
            if mark.text not in written:
                raise SampleError("template", _late_system_turn(late, "leaves out"))

    def _ends_by_markers(self, text: str, conversation: Conversation, arguments: Mapping[str, Any]) -> list[int | None]:
        """Return where the content of each turn ends, without trailing white space; None for a turn without content."""
        marker = unused_character(conversation)
        call = self._one_more_call(marker) if any(map(has_call_mark, conversation.messages)) else ""
        marked = self._render_messages(conversation, marker, arguments)
        plain, ends = ends_of_turns(marked, marker, call, conversation.messages)
        if plain != text:
            raise SampleError(
                "template",
                "the checkpoint's chat template rewrites the text of this sample, so that the ends of its turns cannot "
                "be found. Look at the rendered text with tools/show_sample.py and reword or remove the sample.",
            )
        return ends

    def _one_more_call(self, name: str) -> str:
        """Return the text that the template writes for one more call after those of an answer.

        Raises:
            SampleError: The text cannot be found.
        """
        question, calls = Message("user", (TextPart("Q"),)), [function_call("f"), function_call(name)]
        fewer, more = (
            self._render_messages(
                Conversation((question, Message("assistant", (TextPart("A"),), {"tool_calls": calls[:n]}))), None, {}
            ).removesuffix(self.turn_end)
            for n in (1, 2)
        )
        added = more.removeprefix(fewer)
        if added == more or name not in added:
            raise SampleError("template", "the checkpoint's chat template does not write calls one after the other.")
        return added

    def _spans(
        self, text: str, messages: Sequence[Message], ends: Sequence[int | None], arguments: Mapping[str, Any]
    ) -> Rendering:
        """Return the trained spans; ``ends`` has the end of the content of each turn, None for one without content."""
        spans, turns = [], []
        cursor = 0
        for index, (message, end) in enumerate(zip(messages, ends, strict=True)):
            if message.role == "assistant":
                start = text.find(self.header, cursor) + len(self.header)
                stop = text.find(self.turn_end, start if end is None else end)
                if end is None and self.turn_end.strip() in message.extra.get(THOUGHT, ""):
                    reason = f"a thought without an answer holds {self.turn_end.strip()}, which would end it."
                    raise SampleError("template", f"{reason} Reword it, or write the answer.")
                if start < len(self.header) or stop < 0:
                    raise SampleError("template", "the checkpoint's chat template leaves out an answer of this sample.")
                cursor = stop + len(self.turn_end)
                if message.trained:
                    spans.append((start, cursor))
                    turns.append(index)
            elif end is not None:
                cursor = end
        return Rendering(
            text,
            tuple(spans),
            tuple(turns),
            (arguments,) * len(spans),
            thinks=tuple(bool(thought_of(messages[turn])) for turn in turns),
            weights=weights_of(messages[turn].weight for turn in turns),
            whole=True,
            thoughts_left_out=tuple(_left_out(text, spans, turns, messages)),
        )

    def _render_messages(
        self, conversation: Conversation, marker: str | None, arguments: Mapping[str, Any], **kwargs: Any
    ) -> str:
        written = [as_template_message(message, marker) for message in conversation.messages]
        return self._render_written(conversation, written, arguments, **kwargs)

    def _render_written(
        self, conversation: Conversation, written: list[dict[str, Any]], arguments: Mapping[str, Any], **kwargs: Any
    ) -> str:
        """Render the first turns of a conversation, written as templates take them."""
        tools = [dict(tool) for tool in conversation.tools] or None
        try:
            return self._render(written, tools=tools, **{**arguments, **kwargs})
        except Exception as error:  # templates raise whatever their author chose (jinja2, TypeError, ...)
            said = str(error).strip().rstrip(".") or type(error).__name__
            advice = advice_on_calls(replace(conversation, messages=conversation.messages[: len(written)]))
            raise SampleError(
                "template", f"the checkpoint's chat template refuses this sample: {said}.{advice}"
            ) from error

    def _render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        arguments = {**self.kwargs, **kwargs}
        if arguments.get(SWITCH) == "auto":
            del arguments[SWITCH]
        if self._source is not None and _is_plain(messages, arguments):
            given = {**_NONE, **self._special, **arguments}
            return str(_compile_jinja_template(self._source).render(messages=messages, **given))
        try:
            return str(self._processor.apply_chat_template(messages, tokenize=False, **arguments))
        except ValueError as error:
            if "chat_template" not in str(error) and "chat template" not in str(error):
                raise
            raise UserError(
                "The checkpoint's processor has no chat template. Copy the original checkpoint's chat_template.jinja "
                "or chat_template.json into its folder."
            ) from error


def _template_source(processor: Any) -> str | None:
    """Return the text of the template that ``apply_chat_template`` renders; None where only that method knows it."""
    stock = getattr(type(processor), "apply_chat_template", None) is ProcessorMixin.apply_chat_template
    source = processor.chat_template if stock else None
    return source if isinstance(source, str) else None


def _is_plain(messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> bool:
    """Return whether ``apply_chat_template`` hands everything to the template as it is.

    It prepares calls, thoughts, tools and structured values first, differently in each version. It does not change
    turns of text and media, but takes as long for them as the template itself.
    """
    return all(len(message) == 2 for message in messages) and all(
        value is None or type(value) in (bool, int, float, str) for value in arguments.values()
    )


def _without_late_system_turns(conversation: Conversation) -> Conversation:
    first, *others = conversation.messages
    return replace(conversation, messages=(first, *(message for message in others if message.role != "system")))


def _late_system_turn(turn: Message, verb: str) -> str:
    """Return the message about a system turn that is not first."""
    return (
        f"the checkpoint's chat template {verb} the system turn {reprlib.repr(turn.text)}, which is not the first "
        "turn. Put all that the system says into one system turn at the start, or write it into a user turn."
    )


def _left_out(
    text: str, spans: Sequence[tuple[int, int]], turns: Sequence[int], messages: Sequence[Message]
) -> Iterator[int]:
    """Yield the numbers of trained answers whose thought the template leaves out."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    for (start, stop), turn in zip(spans, turns, strict=True):
        if not writes_thought(messages[turn], text[start:stop]):
            yield answers.index(turn) + 1


def weights_of(weights: Iterable[float]) -> tuple[float, ...]:
    """Return the weights of answers; empty where all are 1, so that no weights are computed."""
    found = tuple(weights)
    return found if any(weight != 1 for weight in found) else ()


def weight_lines(rendering: Rendering) -> list[str]:
    """Return a line of text for each answer with a weight other than 1."""
    weights = zip(rendering.turns, rendering.weights, strict=True) if rendering.weights else ()
    return [f"message {turn}: weight {weight:g}" for turn, weight in weights if weight != 1]


def opens_thought(prompt: str) -> bool:
    """Return whether a generation prompt ends within a thought."""
    return prompt.rfind("<think>") > prompt.rfind("</think>")


def _last_answer(conversation: Conversation) -> Message | None:
    return next((message for message in reversed(conversation.messages) if message.role == "assistant"), None)


def _end_of_thought(target: str, place: int) -> int:
    """Return where the closing tag of a thought and the white space after it end."""
    close = target.find("</think>", place)
    stop = place if close < 0 else close + len("</think>")
    return stop + len(target[stop:]) - len(target[stop:].lstrip())


def _no_continuation(thought: str, arguments: Mapping[str, Any]) -> str:
    if thought and arguments.get(SWITCH) is False:
        return (
            f'an answer has a thought, and {SWITCH} is false for it: the prompt closes the thought. Leave "{SWITCH}" '
            "out of chat_template_kwargs (or write auto), or take the thought out."
        )
    if thought:
        return f"the checkpoint's chat template leaves out the thought ('reasoning_content') of an answer. {WAY_OUT}"
    return (
        "the checkpoint's chat template does not write an answer of this sample as the continuation of its prompt, so "
        "that no server could ask for it. Look at the rendered text with tools/show_sample.py and reword the sample, "
        "or use --history as_rendered."
    )
