"""Handle thoughts of answers: a ``<think>`` block at the start of the text, or ``reasoning_content``."""

from __future__ import annotations

import re
from dataclasses import replace

from qwenvl.data.types import Conversation, Message, TextPart
from qwenvl.utils.errors import SampleError

# Prompts open the thought, so that a recorded answer may hold the closing tag alone.
_THOUGHT_FIRST = re.compile(r"\s*(?:<think>)?((?:(?!</?think>).)*)</think>\s*((?:(?!</?think>).)*)", re.DOTALL)


def split_thought(text: str) -> tuple[str, str] | None:
    """Return the thought in front of an answer and the answer; None where the text does not start with one thought."""
    found = _THOUGHT_FIRST.fullmatch(text) if "</think>" in text else None
    return (found[1].strip(), found[2]) if found is not None else None


def thought_of(message: Message) -> str:
    """Return the thought of an answer, without white space around it; empty where it has none."""
    inside = split_thought(message.text)
    thought: str = message.extra.get("reasoning_content", "")
    return thought.strip() or (inside[0] if inside is not None else "")


def writes_thought(message: Message, written: str) -> bool:
    """Return whether the text that a template wrote for an answer has its thought; true for an answer without one."""
    thought = thought_of(message)
    return not thought or ("<think>" in written and thought in written)


def is_empty_answer(message: Message) -> bool:
    """Return whether a turn is a trained answer without content: no text, no thought, no call."""
    if message.role != "assistant" or not message.trained:
        return False
    return not (message.text.strip() or message.extra.get("tool_calls") or thought_of(message))


def with_thoughts_apart(conversation: Conversation) -> Conversation:
    """Return a conversation with thoughts moved from the text of answers to ``reasoning_content``."""
    messages = tuple(map(with_thought_apart, conversation.messages))
    return conversation if messages == conversation.messages else replace(conversation, messages=messages)


def with_thought_apart(message: Message) -> Message:
    """Return an answer with the thought in front of its text as its ``reasoning_content``; other turns as they are."""
    found = split_thought(message.text) if message.role == "assistant" else None
    if found is None or message.extra.get("reasoning_content"):
        return message
    if any(not isinstance(part, TextPart) for part in message.parts):
        return message
    parts = (TextPart(found[1]),) if found[1] else ()
    return replace(message, parts=parts, extra={**message.extra, "reasoning_content": found[0]})


def without_repeated_thought(message: Message, where: str) -> Message:
    """Return an answer without a thought in front of its text that repeats its ``reasoning_content``.

    Args:
        message: Turn of the sample.
        where: Name of the turn, for messages.

    Raises:
        SampleError: the two thoughts differ (``bad_record``).
    """
    thought: str = message.extra.get("reasoning_content", "").strip()
    inside = split_thought(message.text) if thought else None
    if inside is None:
        return message
    if inside[0] != thought:
        reason = "has a <think> block in its text and another thought in 'reasoning_content'. Keep one of them."
        raise SampleError("bad_record", f"{where} {reason}")
    return replace(message, parts=(TextPart(inside[1]),) if inside[1] else ())
