"""Questions and answers in fields of their own: the turns they become, and what is said of fields that are none."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.sources.record_forms import FORMS, as_messages, missing_turns
from qwenvl.data.types import ImageItem, TextPart
from tests.data.records import build, reason_of


def spoken(record: dict[str, Any]) -> list[tuple[str, str, bool]]:
    return [(message.role, message.text, message.trained) for message in build(record).messages]


FIRST = [("user", "a", True), ("assistant", "b", True)]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"query": "q", "response": "r"}, [("user", "q", True), ("assistant", "r", True)]),
        ({"query": "q", "response": "r", "history": [["a", "b"]]},
         [*FIRST, ("user", "q", True), ("assistant", "r", True)]),
        ({"query": "q", "response": "r", "history": None}, [("user", "q", True), ("assistant", "r", True)]),
        ({"instruction": "i", "output": "o"}, [("user", "i", True), ("assistant", "o", True)]),
        ({"instruction": "i", "input": "n", "output": "o"}, [("user", "i\nn", True), ("assistant", "o", True)]),
        ({"instruction": "", "input": "n", "output": "o"}, [("user", "n", True), ("assistant", "o", True)]),
        ({"instruction": "i", "input": "", "output": "o", "history": [("a", "b")], "system": "s"},
         [("system", "s", True), *FIRST, ("user", "i", True), ("assistant", "o", True)]),
        ({"prompt": "p", "completion": "c"}, [("user", "p", False), ("assistant", "c", True)]),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                     {"role": "user", "content": "p", "loss": False}], "completion": "c"},
         [("user", "a", False), ("assistant", "b", False), ("user", "p", False), ("assistant", "c", True)]),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]},
         [("user", "p", False), ("assistant", "c", True)]),
        ({"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
         [*FIRST, ("user", "c", True), ("assistant", "d", True)]),
        ({"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, FIRST),
    ],
)  # fmt: skip
def test_fields_become_turns(record: dict[str, Any], turns: Any) -> None:
    assert spoken(record) == turns
    assert build(record).unread_keys == ()


def test_media_and_other_fields_are_those_of_all_samples() -> None:
    record = {"query": "<image>q", "response": "<image>", "images": ["a.jpg"], "system": "s", "rejected_response": "x"}
    conversation = build(record)
    assert conversation.messages[1].parts == (ImageItem("a.jpg"), TextPart("q"))
    assert conversation.messages[2].parts == (TextPart("<image>"),)
    assert conversation.unread_keys == ("'rejected_response'",)


def test_other_keys_of_a_pair_are_those_of_its_answer() -> None:
    pair = {"human": "a", "assistant": "b"}
    conversation = build({"conversation": [{**pair, "loss": False, "mood": "calm"}, pair]})
    assert [message.trained for message in conversation.messages] == [True, False, True, True]
    assert conversation.unread_keys == ("'mood' of turns",)


def test_turns_come_before_other_forms() -> None:
    """Fields beside turns are not read, and named."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = {"messages": turns, "query": "q", "response": "r", "prompt": "p"}
    assert as_messages(record) is record
    assert spoken(record) == FIRST
    assert build(record).unread_keys == ("'prompt'", "'query'", "'response'")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"query": "q", "response": "r", "prompt": "p", "completion": "c"}, "answers in 'response' and 'completion'"),
        ({"query": "q", "response": "r", "history": "x"}, "'history' must be a list of [question, answer]"),
        ({"query": "q", "response": "r", "history": [["a"]]}, "'history' must be a list of [question, answer]"),
        ({"query": "q", "response": "r", "history": ["ab"]}, "'history' must be a list of [question, answer]"),
        ({"query": 3, "response": "r"}, "turn 1 (user): its text must be a string"),
        ({"instruction": ["i"], "output": "o"}, "'instruction' and 'input' must be strings"),
        ({"instruction": "i", "input": 3, "output": "o"}, "'instruction' and 'input' must be strings"),
        ({"prompt": ["p"], "completion": "c"}, "turn 1 must be an object"),
        ({"prompt": [], "completion": []}, "an empty list"),
        ({"conversation": [{"human": "a"}]}, "pair 1 of 'conversation' needs 'human' and 'assistant'"),
        ({"conversation": "x"}, "'conversation' must be a list of objects"),
        ({"conversation": ["x"]}, "'conversation' must be a list of objects"),
        ({"conversation": []}, "an empty list"),
        ({"query": "q", "response": None}, "'query' goes with 'response', which is missing"),
        ({"completion": "c"}, "'completion' goes with 'prompt', which is missing"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "a preference, which is not trained here"),
        ({"id": 1, "data": {}, "annotations": []}, "an export of Label Studio"),
        ({"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}, "an annotation of COCO"),
        ({"images": ["a"], "texts": [{"user": "a", "assistant": "b"}]}, "Of 'texts', write each 'user'"),
        ({"text": "a b c"}, "'text' does not say what is question"),
        ({"question": "q", "answer": "a"}, '"conversations": [{"from": "human", "value": QUESTION}'),
    ],
)  # fmt: skip
def test_fields_that_are_no_turns_are_explained(record: dict[str, Any], said: str) -> None:
    assert said in reason_of(record, "bad_record")


def test_a_field_of_another_name_can_be_called_by_columns() -> None:
    """Each message that names a column says which one is read."""
    for form in FORMS:
        for key in form.needs[1:]:
            said = missing_turns([field for field in form.needs if field != key])
            assert f'"columns": {{"{key}": NAME}}' in said
