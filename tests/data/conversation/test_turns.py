"""The keys of a turn: its weight."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.conversation.turns import read_weight, unread_keys_of_turns
from qwenvl.data.types import Conversation, Sample
from qwenvl.utils.errors import Origin, SampleError


def build(*answers: dict[str, Any]) -> Conversation:
    turns = [turn for one in answers for turn in ({"from": "human", "value": "Q"}, {"from": "gpt", **one})]
    return build_conversation(Sample(Origin("d", "f.json", 3), {"conversations": turns}), ())


@pytest.mark.parametrize("key", ["weight", "loss_scale", "loss_weight"])
@pytest.mark.parametrize("value", [0, 0.001, 0.5, 1, 2.0, 1000, True, False])
def test_weights_are_read(key: str, value: Any) -> None:
    turn = {"from": "gpt", "value": "A", key: value}
    assert read_weight(turn, "assistant", 2) == float(value)
    assert unread_keys_of_turns([turn]) == []
    first, second = build({"value": "A", key: value}, {"value": "B"}).messages[1::2]
    assert (first.weight, first.trained, second.weight) == (float(value), value != 0, 1.0)


def test_flags_are_weights_of_0_and_1_and_agree_with_a_weight() -> None:
    assert [read_weight({"loss": value}, "assistant", 2) for value in (True, 0, None)] == [1.0, 0.0, 1.0]
    assert read_weight({"loss": True, "weight": 0.5, "loss_scale": 0.5}, "assistant", 2) == 0.5
    assert read_weight({"weight": 0, "train": False}, "user", 1) == 0.0


@pytest.mark.parametrize(
    "value", [-0.5, float("nan"), float("inf"), "0.5", [0.5], 1e-9, 1001, 10**400, {"a": 1}], ids=repr
)
def test_what_is_no_weight_is_refused(value: Any) -> None:
    with pytest.raises(SampleError, match=r"^turn 2: 'weight' must be 0 \(not trained\) or a number from 0.001 to"):
        read_weight({"weight": value}, "assistant", 2)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"weight": 0.5, "loss_scale": 0.4}, "turn 2: 'weight' and 'loss_scale' differ"),
        ({"weight": 0.5, "loss": False}, "turn 2: 'loss' and 'weight' differ"),
    ],
)
def test_contradictions_are_refused(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        read_weight(turn, "assistant", 2)


def test_only_answers_have_weights() -> None:
    with pytest.raises(SampleError, match=r"turn 1 \(user\): 'weight' asks for training"):
        read_weight({"weight": 0.5}, "user", 1)


def test_calls_of_another_weight_are_an_answer_of_their_own() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": 0.5}]
    counts = []
    for weight in (0.5, 0.25):
        record = {"conversations": [*turns, {**call, "weight": weight}]}
        messages = build_conversation(Sample(Origin("d", "f.json", 3), record), ()).messages
        counts.append([message.weight for message in messages])
    assert counts == [[1.0, 0.5], [1.0, 0.5, 0.25]]
