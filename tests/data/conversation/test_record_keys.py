"""Keys of records, turns and parts: read, refused, of no meaning, or named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qwenvl.data.conversation.messages import build_conversation, examine
from qwenvl.data.types import Sample
from tests.data.records import ANSWER, ORIGIN, RESERVED, build, reason_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
ASKED = {"from": "human", "value": "Who?"}


def unread(**fields: Any) -> tuple[str, ...]:
    return build({"conversations": [ASKED, ANSWER], **fields}).unread_keys


def test_every_key_that_nothing_reads_is_named() -> None:
    turns = [
        {"from": "human", "value": [{"type": "text", "text": "Who?", "cache_control": {}, "image": None}]},
        {**ANSWER, "mood": "calm", "score": None},
    ]
    assert unread(conversations=turns, score=3, picture="a.jpg", note=None, rejected_response="No.") == (
        "'picture'",
        "'rejected_response'",
        "'score'",
        "'mood' of turns",
        "'cache_control' of text parts",
    )


def test_keys_of_no_meaning_are_not_named() -> None:
    """Those that docs/data.md lists, and those that other parts read."""
    listed = PAGE.read_text(encoding="utf-8").split("**Of no meaning**")[1].split("\n\n")[0]
    known = dict.fromkeys(re.findall("`(.*?)`", listed), "x")
    assert len(known) > 30
    of_tasks = {"id": 1, "bbox_format": "pixel", "label": "cat", "masks": [], "answers": ["a"], "metric": "anls"}
    of_tasks |= {"kto_tag": True}
    empty = {"image": "", "images": [], "audios": [], "video": None, "tools": None, "system": ""}
    assert unread(**known, **of_tasks, **empty) == ()
    assert unread(conversations=[{**ASKED, "images": [], "audios": []}, ANSWER]) == ()


def test_keys_are_named_of_samples_that_cannot_be_used_too() -> None:
    examined = examine(Sample(ORIGIN, {"conversations": [ASKED], "score": 3}), RESERVED)
    assert examined.problems and examined.conversation.unread_keys == ("'score'",)


def test_a_long_key_is_cut() -> None:
    assert unread(**{"k" * 1000: 1}) == (repr("k" * 80),)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"audios": ["a.wav"], "conversations": [ASKED, ANSWER]}, "the sample has 'audios'. The models cannot hear"),
        ({"audio": "a.wav", "conversations": [ASKED, ANSWER]}, "the sample has 'audio'. The models cannot hear"),
        ({"conversations": [{**ASKED, "audio": "a.wav"}, ANSWER]}, "turn 1 has 'audio'. The models cannot hear"),
        ({"conversations": [{"from": "human", "value": "<audio>Who?"}, ANSWER]},
         "turn 1 (user) holds <audio>. The models cannot hear"),
        ({"conversations": [{"from": "human", "value": [{"type": "input_audio"}]}, ANSWER]},
         "turn 1 (user) has a part of type 'input_audio'. The models cannot hear"),
        ({"label": False, "conversations": [ASKED, ANSWER]}, "the sample has 'label' false, which in KTO marks a bad"),
        ({"kto_tag": False, "conversations": [ASKED, ANSWER]}, "the sample has 'kto_tag' false"),
        ({"label": False, "prompt": "Who?", "completion": "Nobody."}, "the sample has 'label' false"),
    ],
)  # fmt: skip
def test_what_changes_the_meaning_and_cannot_be_followed_is_refused(record: dict[str, Any], said: str) -> None:
    assert said in reason_of(record, "bad_record")


def test_audio_in_answers_and_typed_text_is_a_word() -> None:
    turns = [{"from": "human", "value": [{"type": "text", "text": "<audio>?"}]}, {"from": "gpt", "value": "<audio>"}]
    assert [message.text for message in build({"conversations": turns}).messages] == ["<audio>?", "<audio>"]


def test_a_label_that_a_task_learns_may_be_false() -> None:
    sample = Sample(ORIGIN, {"label": False, "note": 1, "conversations": [ASKED, ANSWER]})
    conversation = build_conversation(sample, RESERVED, task_fields=("label", "note"))
    assert conversation.unread_keys == ()
    for label in (0, True, "false", None):
        assert unread(label=label) == ()
