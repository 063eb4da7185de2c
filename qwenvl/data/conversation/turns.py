"""Read the keys of a turn besides its speaker and content: calls, thoughts and its weight in the loss."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from qwenvl.data.conversation.media_items import MEDIA_FIELDS, media_keys
from qwenvl.data.conversation.tool_calls import parse_calls
from qwenvl.data.types import Role
from qwenvl.utils.errors import SampleError

TURN_EXTRAS: dict[str, Any] = {
    "tool_calls": list,
    "function_call": Mapping,
    "reasoning_content": str,
    "reasoning": str,
    "name": str,
    "tool_call_id": str,
}
"""Keys that chat templates know, and those of the same meaning: ``reasoning`` of vLLM, the older ``function_call``."""
FLAG_KEYS = ("loss", "train", "loss_mask")
"""Keys of ms-swift, axolotl and UI-TARS for whether an answer is trained."""
WEIGHT_KEYS = ("weight", "loss_scale", "loss_weight")
"""Keys of OpenAI, ms-swift and LLaMA-Factory for the factor of the loss of an answer's tokens."""
_KEYS_OF_WEIGHTS = {*FLAG_KEYS, *WEIGHT_KEYS}
_LEAST, _MOST = 0.001, 1000.0
"""Range of a weight other than 0: numbers outside of it are something else, or a mistake."""
AUDIO_FIELDS = ("audio", "audios")
"""Refused where they hold something; see :mod:`qwenvl.data.conversation.record_keys`."""

_TYPE_NAMES: dict[Any, str] = {list: "a list", Mapping: "an object", str: "a string"}
_READ = frozenset(
    ("from", "value", "role", "content", *TURN_EXTRAS, *FLAG_KEYS, *WEIGHT_KEYS, *MEDIA_FIELDS, *AUDIO_FIELDS)
)


def read_extra(turn: Mapping[str, Any], role: Role, number: int) -> dict[str, Any]:
    """Return the keys of a turn that chat templates know, under the names that they use.

    Raises:
        SampleError: a value is of another type, belongs to an answer and not to this turn, or differs from another
            value of the same meaning (``bad_record``).
    """
    extra = {key: turn[key] for key in TURN_EXTRAS if turn.get(key) is not None}
    for key, value in extra.items():
        kind = TURN_EXTRAS[key]
        if not isinstance(value, kind):
            found = type(value).__name__
            raise SampleError("bad_record", f"turn {number}: {key!r} must be {_TYPE_NAMES[kind]}, not {found}.")
        if key not in ("name", "tool_call_id") and value and role != "assistant":
            raise SampleError("bad_record", f"turn {number} ({role}) has {key!r}, which only assistant turns can have.")
    _rename(extra, "reasoning", "reasoning_content", number)
    if "function_call" in extra:
        extra["function_call"] = [extra["function_call"]]
        _rename(extra, "function_call", "tool_calls", number)
    if not all(isinstance(call, Mapping) for call in extra.get("tool_calls", ())):
        raise SampleError("bad_record", f"turn {number}: 'tool_calls' must be a list of objects.")
    if "tool_calls" in extra:
        try:
            extra["tool_calls"] = parse_calls(extra["tool_calls"])
        except SampleError as error:
            raise SampleError(error.category, f"turn {number}: {error.reason}") from error
    return extra


def _rename(extra: dict[str, Any], other: str, name: str, number: int) -> None:
    """Give a value the name that templates use; both names may be there if their values are equal."""
    value = extra.pop(other, None)
    if value and extra.get(name) and extra[name] != value:
        raise SampleError("bad_record", f"turn {number} has {name!r} and {other!r}, which differ. Keep one.")
    if value and not extra.get(name):
        extra[name] = value


def read_weight(turn: Mapping[str, Any], role: Role, number: int) -> float:
    """Return the factor of the loss that a turn gives itself, 1 by default; 0 where it is not trained.

    Raises:
        SampleError: a value is not a flag or weight, two contradict each other, or a turn other than an answer is to be
            trained (``bad_record``).
    """
    if _KEYS_OF_WEIGHTS.isdisjoint(turn):
        return 1.0
    flags = {key: _flag(key, turn[key], number) for key in FLAG_KEYS if turn.get(key) is not None}
    weights = {key: _weight(key, turn[key], number) for key in WEIGHT_KEYS if turn.get(key) is not None}
    given = flags | weights
    if len({bool(one) for one in given.values()}) > 1 or len(set(weights.values())) > 1:
        raise SampleError("bad_record", f"turn {number}: {' and '.join(map(repr, given))} differ. Keep one of them.")
    weight = float(next(iter((weights or flags).values()), 1))
    if given and weight and role != "assistant":
        raise SampleError(
            "bad_record",
            f"turn {number} ({role}): {next(iter(given))!r} asks for training, but only assistant turns are trained. "
            "Take it out.",
        )
    return weight


def _flag(key: str, value: Any, number: int) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    weigh = " 'weight' is the key of a turn's weight." if isinstance(value, float | int) else ""
    raise SampleError(
        "bad_record",
        f"turn {number}: {key!r} must be true or 1 (trained), or false or 0 (not trained), not {reprlib.repr(value)}."
        + weigh,
    )


def _weight(key: str, value: Any, number: int) -> float:
    if isinstance(value, bool | int | float) and (value == 0 or _LEAST <= value <= _MOST):
        return float(value)
    raise SampleError(
        "bad_record",
        f"turn {number}: {key!r} must be 0 (not trained) or a number from {_LEAST:g} to {_MOST:g}, the factor of the "
        f"turn's loss, not {reprlib.repr(value)}.",
    )


def unread_keys_of_turns(turns: Iterable[Any]) -> list[str]:
    """Return the keys of turns and of their text parts that nothing reads, for messages.

    Null values count as absent. Keys of media parts are read or refused elsewhere.
    """
    known = [turn for turn in turns if isinstance(turn, Mapping)]
    lists = [turn[key] for turn in known for key in ("value", "content") if isinstance(turn.get(key), list)]
    texts = [part for parts in lists for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    unread, unread_of_texts = _given(known) - _READ, _given(texts) - {"type", "text"}
    if unread:
        unread -= {key for turn in known for keys in media_keys(turn).values() for key in keys}
    found = sorted(unread), sorted(unread_of_texts)
    return [
        f"{key[:80]!r} of {what}" for keys, what in zip(found, ("turns", "text parts"), strict=True) for key in keys
    ]


def _given(objects: Iterable[Mapping[Any, Any]]) -> set[str]:
    return {str(key) for one in objects for key in one if one[key] is not None}
