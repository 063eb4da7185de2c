"""Convert turns to the form of chat templates, with marks that show where a template writes their ends.

Each turn's text gets a marker character at its end. An answer with tool calls gets one more call, of a function whose
name is the marker: the template writes it right after the last real call, whatever that one contains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from qwenvl.data.types import Conversation, ImageItem, Message, TextPart
from qwenvl.utils.errors import SampleError

_THOUGHT_END = "</think>"
_TOOL_RESPONSE_END = "</tool_response>"
_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xE100)]


def function_call(name: str) -> dict[str, Any]:
    """Return a call without arguments, as chat templates take it."""
    return {"type": "function", "function": {"name": name, "arguments": {}}}


def as_template_message(message: Message, marker: str | None) -> dict[str, Any]:
    """Return the turn as chat templates take it, with its marks where ``marker`` is given."""
    content: list[dict[str, Any]] = []
    last_text = max((i for i, part in enumerate(message.parts) if isinstance(part, TextPart)), default=-1)
    for index, part in enumerate(message.parts):
        if isinstance(part, TextPart):
            marked = marker is not None and index == last_text and has_text_mark(message)
            content.append({"type": "text", "text": _mark(part.text, marker or "") if marked else part.text})
        else:
            content.append({"type": "image" if isinstance(part, ImageItem) else "video"})
    only_text = all(item["type"] == "text" for item in content)
    # Templates handle plain strings best: some search them for <think> and tool responses.
    body: Any = "".join(item["text"] for item in content) if only_text else content
    written = {"role": message.role, "content": body, **message.extra}
    if marker is not None and has_call_mark(message):
        written["tool_calls"] = [*message.extra["tool_calls"], function_call(marker)]
    return written


def has_text_mark(message: Message) -> bool:
    """Return whether a turn's text gets a mark.

    White space gets none, because templates may strip it. A thought right in front of calls gets none either: text
    after it would turn the thought into part of the text.
    """
    text = message.text
    if has_call_mark(message):
        text = text.rpartition(_THOUGHT_END)[2]
    return bool(text.strip())


def has_call_mark(message: Message) -> bool:
    """Return whether a turn gets one more call."""
    return message.role == "assistant" and bool(message.extra.get("tool_calls"))


def ends_of_turns(marked: str, marker: str, call: str, messages: Sequence[Message]) -> tuple[str, list[int | None]]:
    """Take the marks out of a rendering.

    Args:
        marked: Rendered text of the marked turns.
        marker: Marker character.
        call: Text that the template writes for a call that is a mark; empty where no turn has one.
        messages: Turns of the sample.

    Returns:
        The rendered text without marks, and where in it the calls, or else the text, of each turn end, without trailing
        white space; None for a turn without marks. The text is empty if marks are missing or in another order than the
        turns.
    """
    pieces = re.split(f"({re.escape(call)}|{marker})" if call else f"({marker})", marked)
    expected = [[marker] * has_text_mark(message) + [call] * has_call_mark(message) for message in messages]
    if pieces[1::2] != [mark for marks in expected for mark in marks]:
        return "", []
    ends: list[int | None] = []
    place, texts = 0, iter(pieces[::2])
    for marks in expected:
        for _ in marks:
            place += len(next(texts))
        ends.append(place if marks else None)
    return "".join(pieces[::2]), ends


def unused_character(conversation: Conversation) -> str:
    """Return a character of the private use area that the conversation does not contain.

    Raises:
        SampleError: the conversation contains all of them.
    """
    extras = [[message.text, dict(message.extra)] for message in conversation.messages]
    everything = json.dumps([extras, [dict(tool) for tool in conversation.tools]], ensure_ascii=False, default=str)
    for character in _PRIVATE_USE:
        if character not in everything:
            return character
    raise SampleError("bad_record", "the text uses every character of the private use area U+E000 to U+E0FF.")


def _mark(text: str, marker: str) -> str:
    """Put the marker after the text, but before endings that templates look for: white space, a closing tag."""
    stripped = text.rstrip()
    if stripped.endswith(_TOOL_RESPONSE_END):
        stripped = stripped[: -len(_TOOL_RESPONSE_END)]
    return stripped + marker + text[len(stripped) :]
