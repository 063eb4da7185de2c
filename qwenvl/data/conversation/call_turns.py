"""Read turns that are tool calls (``function_call`` of LLaMA-Factory, ``tool_call`` of ms-swift) as ``tool_calls``.

Their content is one call as JSON, or a list of calls, which may follow a thought. Text of the assistant and the call
turns after it are joined to one turn, as a server has them.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwenvl.data.conversation.tool_calls import parse_calls
from qwenvl.data.types import Message, TextPart
from qwenvl.utils.errors import SampleError

CALL_ROLES = ("function_call", "tool_call")

_THOUGHT_FIRST = re.compile(r"\s*(<think>.*?</think>|)\s*(.*)", re.DOTALL)
_FORM = '{"name": "look", "arguments": {"at": "left"}}'


def is_call_turn(speaker: Any) -> bool:
    """Return whether a turn of this speaker is a call."""
    return isinstance(speaker, str) and speaker.lower() in CALL_ROLES


def read_call_turn(content: Any, extra: Mapping[str, Any], where: str) -> Message:
    """Return a turn that is a call.

    Args:
        content: Content of the turn: JSON, or the value that the JSON stands for.
        extra: Other keys of the turn that templates know.
        where: Name of the turn, for messages.

    Raises:
        SampleError: it is not a call, or it has calls twice (``bad_record``).
    """
    if content in (None, "", []) and extra.get("tool_calls"):
        return Message("assistant", (), extra)
    if extra.get("tool_calls"):
        raise SampleError("bad_record", f"{where} has calls in its content and in 'tool_calls'. Keep one of them.")
    thought, calls = _thought_and_calls(content, where)
    try:
        parsed = parse_calls(calls)
    except SampleError as error:
        raise SampleError(error.category, f"{where}: {error.reason}") from error
    return Message("assistant", (TextPart(thought),) if thought else (), {**extra, "tool_calls": parsed})


def _thought_and_calls(content: Any, where: str) -> tuple[str, list[Mapping[str, Any]]]:
    thought, value = "", content
    if _is_typed_text(content):
        value = content = "".join(part["text"] for part in content)
    if isinstance(content, str):
        found = _THOUGHT_FIRST.fullmatch(content)
        assert found is not None
        thought = found[1]
        try:
            value = json.loads(found[2])
        except (ValueError, RecursionError):
            value = None
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list) or not calls or not all(isinstance(call, Mapping) for call in calls):
        raise SampleError(
            "bad_record",
            f"{where} must be a call as JSON, such as {_FORM}, or a list of such calls, not {reprlib.repr(content)}. "
            "Words of the model, or a call in its own form, belong into a turn of 'assistant' ('gpt').",
        )
    return thought, calls


def _is_typed_text(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
        and all(isinstance(part.get("text"), str) for part in content)
    )


def join_calls(messages: Iterable[Message], are_calls: Sequence[bool]) -> list[Message]:
    """Put calls into the answer right before them, if both have the same weight and the calls have no thought.

    Args:
        messages: Turns of the sample.
        are_calls: Whether each of them is a call turn.
    """
    joined: list[Message] = []
    for message, is_call in zip(messages, are_calls, strict=True):
        before = joined[-1] if joined else None
        if is_call and before is not None and _belong_together(before, message):
            calls = [*before.extra.get("tool_calls", ()), *message.extra["tool_calls"]]
            joined[-1] = replace(before, extra={**before.extra, **message.extra, "tool_calls": calls})
        else:
            joined.append(message)
    return joined


def _belong_together(before: Message, call: Message) -> bool:
    thinks = bool(call.parts or call.extra.get("reasoning_content"))
    return before.role == "assistant" and before.weight == call.weight and not thinks
