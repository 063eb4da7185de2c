"""Read records of other trainers, with questions and answers in fields of their own, as turns.

========================  ============================================================================================
``query``, ``response``   ms-swift; with ``history``, a list of [question, answer]
``instruction``,          alpaca; with ``input``, which goes on the next line of the question, and ``history``
``output``
``prompt``,               TRL: text, or lists of turns. Of these the answers in ``prompt`` are not trained
``completion``
``conversation``          ms-swift: a list of {"human": question, "assistant": answer}; or a list of turns
========================  ============================================================================================

The other fields (media, ``system``, ``tools``, ...) are the same in all forms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qwenvl.utils.errors import SampleError

Record = Mapping[str, Any]
Turns = list[Any]

TURN_FIELDS = ("conversations", "messages")
LISTS_OF_TURNS = ("prompt", "completion", "conversation")
"""Fields of other forms that may hold lists of objects."""

_EXAMPLE = '"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]'
_HINTS = (
    (("chosen", "rejected"), "It is a preference, which is not trained here: write the question and the chosen answer"),
    (("data", "annotations"), "It is an export of Label Studio, with labels and without a question: write one"),
    (("image_id", "bbox"), "It is an annotation of COCO, with a box and without a question: write one"),
    (("texts",), "Of 'texts', write each 'user' and 'assistant'"),
    (("text",), "'text' does not say what is question and what answer: write them"),
)
"""Hints for records of other kinds, by their keys."""
_PAIR = {"human", "assistant"}


@dataclass(frozen=True, slots=True)
class RecordForm:
    """A form of records.

    Args:
        needs: Fields that a record of this form has.
        may_have: Other fields that are read.
        turns: Function from a record to turns; the fields in ``may_have`` may be missing or null.
    """

    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    turns: Callable[[Record], Turns]

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that are read."""
        return (*self.needs, *self.may_have)


def find_forms(keys: Collection[str]) -> list[RecordForm]:
    """Return the forms whose required fields are among some keys."""
    return [form for form in FORMS if all(key in keys for key in form.needs)]


def form_of(record: Record) -> RecordForm | None:
    """Return the form of a record; None where it has turns, or nothing that is read as turns.

    Raises:
        SampleError: the record has several (``bad_record``).
    """
    given = [key for key in record if record[key] is not None]
    found = [] if any(field in given for field in TURN_FIELDS) else find_forms(given)
    if len(found) > 1:
        names = " and ".join(repr(form.needs[-1]) for form in found)
        raise SampleError("bad_record", f"the sample has answers in {names}. Keep one of them.")
    return found[0] if found else None


def as_messages(record: Record) -> Record:
    """Return a record of any form with its turns as ``messages``; one that has turns, or none, as it is.

    Raises:
        SampleError: its fields are not what the form says (``bad_record``).
    """
    form = form_of(record)
    if form is None:
        return record
    return {**{key: record[key] for key in record if key not in form.fields}, "messages": form.turns(record)}


def missing_turns(keys: Collection[str]) -> str:
    """Return advice on what to write, for a record with these keys and no turns."""
    for known, hint in _HINTS:
        if all(key in keys for key in known):
            return f"{hint} as {_EXAMPLE}."
    for form in FORMS:
        missing = [key for key in form.needs if key not in keys]
        if len(missing) < len(form.needs):
            given = next(key for key in form.needs if key in keys)
            return (
                f"{given!r} goes with {missing[0]!r}, which is missing: add it, or say in the registry entry which "
                f'field it is: "columns": {{"{missing[0]}": NAME}}.'
            )
    return f"Write {_EXAMPLE}."


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _pair(question: Any, answer: Any) -> Turns:
    return [_turn("user", question), _turn("assistant", answer)]


def _history(record: Record) -> Turns:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in history):
        raise SampleError("bad_record", "'history' must be a list of [question, answer].")
    return [turn for question, answer in history for turn in _pair(question, answer)]


def _of_query(record: Record) -> Turns:
    return [*_history(record), *_pair(record["query"], record["response"])]


def _of_instruction(record: Record) -> Turns:
    given = [record["instruction"], record.get("input")]
    if not all(isinstance(text, str | None) for text in given):
        raise SampleError("bad_record", "'instruction' and 'input' must be strings.")
    return [*_history(record), *_pair("\n".join(filter(None, given)), record["output"])]


def _of_prompt(record: Record) -> Turns:
    prompt, completion = record["prompt"], record["completion"]
    asked = prompt if isinstance(prompt, list) else [_turn("user", prompt)]
    answered = completion if isinstance(completion, list) else [_turn("assistant", completion)]
    return [*map(_as_context, asked), *answered]


def _as_context(turn: Any) -> Any:
    """Return a turn of a prompt, which TRL does not train, whatever its role."""
    return {**turn, "loss": False} if isinstance(turn, Mapping) and turn.get("loss") is None else turn


def _of_conversation(record: Record) -> Turns:
    pairs = record["conversation"]
    if not isinstance(pairs, list) or not all(isinstance(one, Mapping) for one in pairs):
        raise SampleError("bad_record", "'conversation' must be a list of objects.")
    if all(_PAIR.isdisjoint(one) for one in pairs):
        return pairs
    turns = []
    for number, one in enumerate(pairs, start=1):
        if not _PAIR.issubset(one):
            raise SampleError("bad_record", f"pair {number} of 'conversation' needs 'human' and 'assistant'.")
        question, answer = _pair(one["human"], one["assistant"])
        rest = {key: one[key] for key in one if key not in _PAIR}  # read, or reported, as keys of the answer
        turns += [question, {**rest, **answer}]
    return turns


FORMS = (
    RecordForm(("query", "response"), ("history",), _of_query),
    RecordForm(("instruction", "output"), ("input", "history"), _of_instruction),
    RecordForm(("prompt", "completion"), (), _of_prompt),
    RecordForm(("conversation",), (), _of_conversation),
)

FORM_FIELDS = tuple(dict.fromkeys(field for form in FORMS for field in form.fields))
"""Fields of records that :func:`as_messages` reads."""
