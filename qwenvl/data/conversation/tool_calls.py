"""Parse tool calls, and check that a chat template writes tools, calls and thoughts; those of older models do not.

A template without support for ``tools`` and ``tool_calls`` leaves them out silently, and an empty answer would be
trained. Templates write values in different ways (quoted, escaped, as XML). So the sample is rendered once more with a
number in place of every name and value of its calls and every name of its tools, and all of these numbers must be in
the rendered text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenvl.data.types import Conversation, Message
from qwenvl.utils.errors import SampleError

WAY_OUT = (
    "It would be neither seen nor learned, and a server would not write it either. Write it as text, in the form that "
    "the model is to read and write (calls and thoughts into the answer, tools into the system turn); or put a chat "
    "template that writes it into the checkpoint's folder."
)
_CALL_KEYS = ("name", "id", "type", "index")


def parse_calls(calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return tool calls with arguments as objects, as servers hand them to chat templates.

    The protocol of OpenAI has the arguments of a call as a JSON string. Arguments that are not a JSON object stay as
    they are; missing ones become an empty object.

    Raises:
        SampleError: a call has no name (``bad_record``).
    """
    return [_parse_call(call) for call in calls]


def as_function_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tool in the form that servers hand to chat templates: its description under ``function``.

    LLaMA-Factory and OpenAI's Responses API have the description alone; other kinds of tools stay as they are.
    """
    described = {key: value for key, value in tool.items() if key != "type"}
    is_function = tool.get("type") in (None, "function") and "function" not in tool
    return {"type": "function", "function": described} if is_function and isinstance(tool.get("name"), str) else tool


def _parse_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _parse_call(function)}
    if not isinstance(call.get("name"), str) or not call["name"]:
        raise SampleError("bad_record", "a tool call needs the 'name' of its function.")
    if "arguments" not in call:
        call = _with_arguments(call)
    given = call.get("arguments")
    if given is None or (isinstance(given, str) and not given.strip()):
        return {**call, "arguments": {}}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _with_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call whose arguments have another name or are missing.

    Raises:
        SampleError: a key may hold them, and its meaning is not known (``bad_record``).
    """
    other = [key for key in call if key not in _CALL_KEYS and call[key] not in (None, "", {})]
    if other == ["parameters"]:
        return {**{key: value for key, value in call.items() if key != "parameters"}, "arguments": call["parameters"]}
    if other:
        raise SampleError(
            "bad_record",
            f"the tool call of {call['name'][:80]!r} has no 'arguments', but {', '.join(map(repr, map(str, other)))}, "
            "which nothing reads. Name its arguments 'arguments'.",
        )
    return call


def advice_on_calls(conversation: Conversation) -> str:
    """Return advice for a sample that a template refuses: write arguments as an object, where they are not one."""
    calls = [call for message in conversation.messages for call in message.extra.get("tool_calls", ())]
    functions = [call.get("function", call) for call in calls]
    other = [one for one in functions if isinstance(one, Mapping) and not isinstance(one.get("arguments"), Mapping)]
    return f" Write the 'arguments' of {str(other[0].get('name'))[:80]!r} as an object." if other else ""


@dataclass(frozen=True, slots=True)
class StandIns:
    """A conversation with numbers in place of names and values, to see which of them a template writes.

    Args:
        conversation: Conversation with the numbers.
        wanted: Name and numbers of each thing that must be written: one of its numbers must be in the rendering.
    """

    conversation: Conversation
    wanted: tuple[tuple[str, tuple[str, ...]], ...]

    def require_written(self, rendered: str) -> None:
        """Check a rendering of :attr:`conversation`.

        Raises:
            SampleError: the template leaves something out (``template``).
        """
        for what, numbers in self.wanted:
            if not any(number in rendered for number in numbers):
                raise SampleError("template", f"the checkpoint's chat template leaves out {what}. {WAY_OUT}")


def stand_ins(conversation: Conversation, rendered: str) -> StandIns:
    """Return a conversation with stand-ins for the names of its tools, its calls, and the thought of its last answer.

    Templates rightly leave out thoughts of earlier answers.

    Args:
        conversation: Conversation of the sample.
        rendered: Rendered text of it, which must not contain a stand-in.

    Raises:
        SampleError: values are nested too deeply (``bad_record``).
    """
    numbers = _Numbers(rendered)
    try:
        tools = tuple(numbers.tool(tool) for tool in conversation.tools)
        messages = [_with_calls(message, numbers) for message in conversation.messages]
    except RecursionError as error:
        raise SampleError("bad_record", "a tool or tool call is nested too deeply to be read.") from error
    if messages and messages[-1].role == "assistant" and messages[-1].extra.get("reasoning_content"):
        thought = numbers.of("the thought ('reasoning_content') of the last answer")
        messages[-1] = replace(messages[-1], extra={**messages[-1].extra, "reasoning_content": thought})
    return StandIns(replace(conversation, messages=tuple(messages), tools=tools), tuple(numbers.wanted))


def _with_calls(message: Message, numbers: _Numbers) -> Message:
    calls = message.extra.get("tool_calls")
    if not calls:
        return message
    return replace(message, extra={**message.extra, "tool_calls": [numbers.call(call) for call in calls]})


class _Numbers:
    """Gives out stand-ins: numbers of twelve digits whose first digits are not in a text."""

    def __init__(self, text: str) -> None:
        self.wanted: list[tuple[str, tuple[str, ...]]] = []
        stem = next(stem for stem in itertools.count(719_000) if str(stem) not in text)
        self._numbers = itertools.count(stem * 1_000_000)

    def of(self, what: str) -> str:
        """Return a stand-in that must be written for something."""
        number = str(next(self._numbers))
        self.wanted.append((what, (number,)))
        return number

    def tool(self, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a tool with a stand-in for its name; one without a name has them for all its texts."""
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return {**tool, "function": self.tool(function)}
        if isinstance(tool.get("name"), str):
            return {**tool, "name": self.of(f"the tool {tool['name'][:80]!r}")}
        texts: list[str] = []
        changed: Mapping[str, Any] = self._texts(tool, texts)
        self.wanted += [("a tool that has no 'name'", tuple(texts))] if texts else []
        return changed

    def call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a call with stand-ins for its name and its arguments, down to the innermost."""
        function = call.get("function")
        if isinstance(function, Mapping):
            return {**call, "function": self.call(function)}
        where = f"the tool call of {str(call.get('name'))[:80]!r}"
        changed = {**call, "name": self.of(where)}
        if "arguments" in call:
            changed["arguments"] = self._value(call["arguments"], f"an argument of {where}")
        return changed

    def _value(self, value: Any, what: str) -> Any:
        if isinstance(value, Mapping):
            return {self.of(what): self._value(item, what) for item in value.values()}
        if isinstance(value, list | tuple):
            return [self._value(item, what) for item in value]
        if isinstance(value, bool) or value is None:
            return value
        return type(value)(self.of(what)) if isinstance(value, int | float) else self.of(what)

    def _texts(self, value: Any, texts: list[str]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._texts(item, texts) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._texts(item, texts) for item in value]
        if not isinstance(value, str):
            return value
        texts.append(str(next(self._numbers)))
        return texts[-1]
