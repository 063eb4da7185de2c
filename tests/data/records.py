"""Records in ShareGPT form for the tests of messages, and how they are read or refused."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.types import Conversation, Message, Sample
from qwenvl.utils.errors import Origin, SampleError

ORIGIN = Origin("things", "things.jsonl", 5, "x")
RESERVED = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>")
ANSWER = {"from": "gpt", "value": "yes"}


def build(record: Any) -> Conversation:
    return build_conversation(Sample(ORIGIN, record), RESERVED)


def ask(question: Any, **fields: Any) -> Message:
    """Build one question with its answer, and return the question."""
    return build({"conversations": [{"from": "human", "value": question}, ANSWER], **fields}).messages[0]


def reason_of(record: Any, category: str) -> str:
    with pytest.raises(SampleError) as caught:
        build(record)
    assert caught.value.category == category, str(caught.value)
    assert caught.value.origin == ORIGIN
    return caught.value.reason


def reason_of_question(question: Any, category: str, **fields: Any) -> str:
    return reason_of({"conversations": [{"from": "human", "value": question}, ANSWER], **fields}, category)
