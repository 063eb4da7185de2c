"""Turn a record of an annotation file into turns of text and media, each tag bound to one image or video.

Two forms are read; the forms of :mod:`qwenvl.data.sources.record_forms` are turned into the second one. ShareGPT:
``conversations``, turns of ``from`` and ``value``, media in ``image``/``images`` and ``video``/``videos``, bound in
order to the ``<image>`` and ``<video>`` tags of user and tool turns. OpenAI and Qwen: ``messages``, turns of ``role``
and ``content``, where content is text (with tags, as above) or a list of typed parts. ``<img>a.jpg</img>`` (Qwen-VL) is
a tag that contains the source of its image. A turn may have media of its own: they are bound to its tags, or put before
its text where it has none. A field that is null counts as absent, except in tools and in the arguments of tool calls,
where null is a value. (In Arrow and Parquet, the two cannot be distinguished; see :mod:`qwenvl.data.sources.nulls`.)
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qwenvl.config.data import TEMPLATE_ARGUMENTS
from qwenvl.data.conversation.boxes.objects import check_tags, read_objects
from qwenvl.data.conversation.call_turns import CALL_ROLES, is_call_turn, join_calls, read_call_turn
from qwenvl.data.conversation.clip_limits import with_limits
from qwenvl.data.conversation.media_items import IMG_TAG, KINDS, MediaPool, turn_pool, typed_media
from qwenvl.data.conversation.record_keys import NO_AUDIO, check_keys, unread_keys
from qwenvl.data.conversation.thoughts import without_repeated_thought
from qwenvl.data.conversation.tool_calls import as_function_tool
from qwenvl.data.conversation.turns import read_extra, read_weight
from qwenvl.data.sources.record_forms import TURN_FIELDS, as_messages, form_of, missing_turns
from qwenvl.data.types import Conversation, ImageItem, Message, Part, Role, Sample, TextPart, VideoItem
from qwenvl.utils.errors import SampleError, nearest

T = TypeVar("T")
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    **dict.fromkeys(CALL_ROLES, "assistant"),
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""Speakers of ShareGPT, OpenAI, LLaMA-Factory and ms-swift, in small letters."""
MEDIA_ROLES = ("user", "tool")

_PEOPLE = [name for name, role in ROLES.items() if role != "tool" and name not in CALL_ROLES]
"""Speakers that a hint may suggest: not those of calls and tools, as a wrong guess would change what is trained."""

_TAGS = re.compile(f"(<image>|<video>|{IMG_TAG})")
_SURROGATES = re.compile("[\ud800-\udfff]")


def build_conversation(
    sample: Sample, reserved_tokens: Collection[str], *, answered: bool = True, task_fields: Collection[str] = ()
) -> Conversation:
    """Read a sample's turns and bind its media to them.

    White space next to a bound tag is removed; all other text stays as written. In answers, system turns and typed
    text parts a tag is plain text.

    Args:
        sample: Record and its origin.
        reserved_tokens: Tokens that only the template may write, such as ``<|image_pad|>``.
        answered: Whether a sample without an assistant turn is an error.
        task_fields: Fields of the record that a task reads.

    Raises:
        SampleError: the record cannot be used; ``category`` is one of ``bad_record``, ``bad_role``, ``no_answer``,
            ``reserved_token``, ``too_many_tags`` and ``too_few_tags``.
    """
    examined = examine(sample, reserved_tokens, answered=answered, task_fields=task_fields)
    if examined.problems:
        raise examined.problems[0]
    return examined.conversation


@dataclass(frozen=True, slots=True)
class Examined:
    """A sample that was read to its end in spite of problems.

    Args:
        conversation: Turns that can be read. Where there are more tags than media, stand-ins with an empty source are
            bound to the last tags.
        media: Images and videos in the order of the turns; where there are problems, all that the record names, bound
            or not, equal ones once.
        problems: All errors of the record.
    """

    conversation: Conversation
    media: tuple[ImageItem | VideoItem, ...]
    problems: tuple[SampleError, ...]


def examine(
    sample: Sample, reserved_tokens: Collection[str], *, answered: bool = True, task_fields: Collection[str] = ()
) -> Examined:
    """Do the same as :func:`build_conversation`, but go on after a problem."""
    problems = _Problems(sample, answered)
    pool = problems.attempt(_read_pool, sample.record)
    conversation = problems.attempt(
        _build, sample.record, pool, reserved_tokens, task_fields, problems
    ) or Conversation(())
    media = conversation.media()
    if problems.found:
        named = (*(pool.items() if pool is not None else ()), *media)
        media = tuple(dict.fromkeys(item for item in named if item.source))
    return Examined(conversation, media, tuple(problems.found))


class _Problems:
    """Collects the errors of a sample."""

    def __init__(self, sample: Sample, wants_answer: bool) -> None:
        self.wants_answer = wants_answer
        self.found: list[SampleError] = []
        self._origin = sample.origin
        given = sample.options.get("chat_template_kwargs")
        self.template_kwargs = {} if given is None else self.attempt(read_template_kwargs, given) or {}

    def attempt(self, function: Callable[..., T], *values: Any) -> T | None:
        """Call a function and return its result; None where it raised a SampleError, which is kept."""
        try:
            return function(*values)
        except SampleError as error:
            found, cause = error.at(self._origin), error.__cause__
        except RecursionError as error:
            reason = "the record is nested too deeply to be a sample."
            found, cause = SampleError("bad_record", reason, self._origin), error
        found.__cause__ = cause
        self.found.append(found)
        return None


def _read_pool(record: Any) -> MediaPool:
    if not isinstance(record, Mapping):
        raise SampleError("bad_record", f"a sample must be an object, not {type(record).__name__}.")
    return MediaPool(record)


def _build(
    record: Any,
    read_pool: MediaPool | None,
    reserved_tokens: Collection[str],
    task_fields: Collection[str],
    problems: _Problems,
) -> Conversation:
    if not isinstance(record, Mapping):
        return Conversation(())
    pool = MediaPool({}) if read_pool is None else read_pool
    form = form_of(record)
    written = _turns(record if form is None else as_messages(record))
    problems.attempt(check_keys, record, written, task_fields)
    turns = [problems.attempt(_message, turn, number, pool) for number, turn in enumerate(written, start=1)]
    messages = [message for message in turns if message is not None]
    for number, message in enumerate(turns, start=1):
        if message is not None:
            problems.attempt(_check_turn_texts, message, number, reserved_tokens)
    if len(messages) == len(turns):
        messages = join_calls(messages, [is_call_turn(_speaker(turn)) for turn in written])
        messages = [message for message in messages if not _is_empty_system(message)]
        for kind in KINDS if read_pool is not None else ():
            problems.attempt(pool.check_bound, kind)
        if problems.wants_answer:
            problems.attempt(_check_answered, messages)
    messages, limits = problems.attempt(with_limits, record, messages) or (messages, [])
    system = problems.attempt(_system, record, messages)
    tools = problems.attempt(_tools, record) or ()
    if system is not None:
        problems.attempt(_check_texts, "the system text", [system.text], reserved_tokens)
    if tools:
        problems.attempt(_check_texts, "tools", _strings(tools), reserved_tokens)
    spoken = [system, *messages] if system else messages
    if len(messages) == len(turns):
        problems.attempt(_check_objects, record, written, spoken, reserved_tokens)
    objects = ["objects"] if read_objects(record) is not None else []
    unread = unread_keys(record, written, [*(form.fields if form else ()), *limits, *task_fields, *objects])
    kwargs = {**problems.template_kwargs, **(problems.attempt(_own_template_kwargs, record) or {})}
    return Conversation(tuple(spoken), tools, unread, template_kwargs=kwargs)


def _own_template_kwargs(record: Mapping[str, Any]) -> Mapping[str, Any]:
    given = record.get("chat_template_kwargs")
    return {} if given is None else read_template_kwargs(given)


def read_template_kwargs(value: Any) -> Mapping[str, Any]:
    """Return template arguments of a sample or dataset: an object, or a JSON string of one.

    Raises:
        SampleError: the value is something else, or holds an argument that the trainer sets.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Mapping):
        raise SampleError("bad_record", "'chat_template_kwargs' must be an object of template arguments.")
    if taken := sorted(TEMPLATE_ARGUMENTS & value.keys()):
        raise SampleError("bad_record", f"'chat_template_kwargs': {taken[0]!r} is set by the trainer. Take it out.")
    return dict(value)


def _check_answered(messages: list[Message]) -> None:
    if not any(message.role == "assistant" for message in messages):
        raise SampleError("no_answer", "no assistant turn, so nothing to learn from. Add the answer, or take it out.")
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise SampleError(
            "no_answer", "every assistant turn is marked as not trained. Train one, or take the sample out."
        )


def _turns(record: Mapping[str, Any]) -> list[Any]:
    given = [key for key in TURN_FIELDS if record.get(key) is not None]
    if len(given) > 1:
        raise SampleError("bad_record", "the sample has both 'conversations' and 'messages'. Keep one of the two.")
    if not given:
        keys = ", ".join(sorted(map(str, record)))[:300] or "none"
        hint = missing_turns([key for key in record if record[key] is not None])
        raise SampleError("bad_record", f"the sample has no 'conversations' or 'messages' (keys: {keys}). {hint}")
    turns = record[given[0]]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else type(turns).__name__
        raise SampleError("bad_record", f"{given[0]!r} must be a list of turns, not {found}.")
    return turns


def _message(turn: Any, number: int, pool: MediaPool) -> Message:
    if not isinstance(turn, Mapping):
        raise SampleError("bad_record", f"turn {number} must be an object, not {type(turn).__name__}.")
    speaker = _either(turn, "from", "role", number)
    role = _role(speaker, number)
    extra, weight = read_extra(turn, role, number), read_weight(turn, role, number)
    content = _either(turn, "value", "content", number)
    where = f"turn {number} ({role})"
    own = turn_pool(turn, where, pool)
    if is_call_turn(speaker):
        where = f"turn {number} ({speaker})"
        call = replace(read_call_turn(content, extra, where), weight=weight)
        return without_repeated_thought(call, where)
    parts = _parts(content, role, where, own)
    parts = parts if own is pool else _with_own_media(parts, own, role, where)
    answers = role in ("assistant", "tool") and content is not None
    may_be_empty = role == "system" or answers or extra.get("tool_calls") or extra.get("reasoning_content")
    if not parts and not may_be_empty:
        raise SampleError("bad_record", f"{where} has neither text nor media. Write it, or take the turn out.")
    return without_repeated_thought(Message(role, parts, extra, weight), where)


def _is_empty_system(message: Message) -> bool:
    return message.role == "system" and not message.text.strip()


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("from") if turn.get("from") is not None else turn.get("role")


def _parts(content: Any, role: Role, where: str, pool: MediaPool) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return _bind_tags(content, pool, where) if role in MEDIA_ROLES else _text(content)
    if isinstance(content, list):
        return tuple(part for item in content for part in _typed_part(item, role, where, pool))
    raise SampleError("bad_record", f"{where}: its text must be a string, not {type(content).__name__}.")


def _with_own_media(parts: tuple[Part, ...], own: MediaPool, role: Role, where: str) -> tuple[Part, ...]:
    """Put the media of a turn that has no tags before its text; where it has tags, check that all are bound."""
    if own.untouched() and all(isinstance(part, TextPart) for part in parts):
        if role not in MEDIA_ROLES:
            raise SampleError("bad_record", f"{where} holds an image or video; only user and tool turns can.")
        return (*own.items(), *parts)
    own.check_bound_in(where)
    return parts


def _either(turn: Mapping[str, Any], first: str, second: str, number: int) -> Any:
    """Return the value of whichever of two keys the turn has."""
    given = [turn[key] for key in (first, second) if turn.get(key) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise SampleError("bad_record", f"turn {number} has {first!r} and {second!r}, which differ. Keep one.")
    return given[0] if given else None


def speaker_role(turn: Mapping[str, Any]) -> Role | None:
    """Return the role of the speaker of a turn; None where it is unknown."""
    speaker = _speaker(turn)
    return ROLES.get(speaker.lower()) if isinstance(speaker, str) else None


def _role(speaker: Any, number: int) -> Role:
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        of_tools = isinstance(speaker, str) and any(word in speaker.lower() for word in ("tool", "func", "call"))
        hint = nearest(speaker[:80].lower(), _PEOPLE) if isinstance(speaker, str) and not of_tools else ""
        known = ", ".join(ROLES)
        raise SampleError("bad_role", f"turn {number} is from {reprlib.repr(speaker)}, which is none of {known}.{hint}")
    return ROLES[speaker.lower()]


def _text(text: str) -> tuple[Part, ...]:
    return (TextPart(text),) if text else ()


def _bind_tags(content: str, pool: MediaPool, where: str) -> tuple[Part, ...]:
    """Split text at its media tags; pieces at odd places are the tags."""
    if "<audio>" in content:
        words = 'Where <audio> is meant as words, write the turn as parts: [{"type": "text", "text": ...}].'
        raise SampleError("bad_record", f"{where} holds <audio>. {NO_AUDIO} {words}")
    pieces = _TAGS.split(content)
    parts: list[Part] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            parts.append(pool.bind(piece))
            continue
        piece = piece.lstrip() if place > 0 else piece
        piece = piece.rstrip() if place < len(pieces) - 1 else piece
        parts.extend(_text(piece))
    return tuple(parts)


def _typed_part(item: Any, role: Role, where: str, pool: MediaPool) -> tuple[Part, ...]:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise SampleError("bad_record", f"{where}: a text part needs a string as its 'text'.")
        return _text(item["text"])
    if isinstance(kind, str) and "audio" in kind:
        raise SampleError("bad_record", f"{where} has a part of type {reprlib.repr(kind)}. {NO_AUDIO}")
    if kind not in ("image", "image_url", "video", "video_url"):
        found = f"of type {reprlib.repr(kind)}" if isinstance(item, Mapping) else reprlib.repr(item)
        known = "text, image, image_url, video or video_url"
        raise SampleError("bad_record", f"{where} has a part {found}; a part is an object of type {known}.")
    if role not in MEDIA_ROLES:
        raise SampleError("bad_record", f"{where} holds an image or video; only user and tool turns can.")
    return (typed_media(item, "image" if kind.startswith("image") else "video", where, pool),)


def _system(record: Mapping[str, Any], messages: list[Message]) -> Message | None:
    """Return the turn that the sample's own ``system`` field stands for; None without one."""
    text = record.get("system")
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):
        raise SampleError("bad_record", f"'system' must be a string, not {type(text).__name__}.")
    turns = [message.text for message in messages if message.role == "system"]
    if turns and turns[0] != text:
        raise SampleError("bad_record", "the 'system' field and the system turn differ. Keep one of them.")
    return None if turns else Message("system", (TextPart(text),))


def _tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise SampleError("bad_record", f"'tools' is a string that is not JSON: {error}") from error
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise SampleError("bad_record", "'tools' must be a list of objects, or a JSON string of one.")
    return tuple(map(as_function_tool, tools))


def _check_objects(
    record: Mapping[str, Any], written: list[Any], spoken: list[Message], reserved_tokens: Collection[str]
) -> None:
    check_tags(record, written, spoken)
    if objects := read_objects(record):
        _check_texts("'ref' of 'objects'", objects.refs, reserved_tokens)


def _check_turn_texts(message: Message, number: int, reserved_tokens: Collection[str]) -> None:
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    _check_texts(f"turn {number} ({message.role})", [*texts, *_strings(message.extra)], reserved_tokens)


def _check_texts(where: str, texts: Collection[str] | Iterator[str], reserved_tokens: Collection[str]) -> None:
    for text in texts:
        for token in reserved_tokens:
            if token in text:
                raise SampleError(
                    "reserved_token",
                    f"{where} holds {token}, which only the chat template may write. Write <image> or <video> where "
                    "media belong, and other words elsewhere.",
                )
        if not text.isascii() and _SURROGATES.search(text):
            raise SampleError("bad_record", f"{where} holds half of a surrogate pair, which is not text in UTF-8.")


def _strings(value: Any) -> Iterator[str]:
    """Yield every string inside nested values, keys included; without recursion, as nesting may be deep."""
    remaining = [value]
    while remaining:
        value = remaining.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            remaining.extend([*value, *value.values()])
        elif isinstance(value, list | tuple):
            remaining.extend(value)
