"""Records with several mistakes: all are found, the first of them is what refuses the record."""

from __future__ import annotations

from qwenvl.data.conversation.messages import examine
from qwenvl.data.types import Sample
from tests.data.records import ANSWER, ORIGIN, RESERVED, build, reason_of


def test_everything_wrong_with_a_record_is_found() -> None:
    turns = [
        {"from": "human", "value": "<image><image> <|image_pad|>"},
        {"from": "nobody", "value": "Hello"},
        {"from": "gpt", "value": "half \ud83d"},
    ]
    record = {
        "conversations": turns,
        "image": "a.jpg",
        "video": ["b.mp4", "c.mp4"],
        "system": 3,
        "tools": [{"x": "<|video_pad|>"}],
    }
    examined = examine(Sample(ORIGIN, record), RESERVED)
    found = [problem.category for problem in examined.problems]
    assert found == ["bad_role", "reserved_token", "bad_record", "bad_record", "reserved_token"]
    assert all(problem.origin == ORIGIN for problem in examined.problems)
    assert [message.role for message in examined.conversation.messages] == ["user", "assistant"]
    assert [item.source for item in examined.media] == ["a.jpg", "b.mp4", "c.mp4"]
    del turns[1:]
    found = [problem.category for problem in examine(Sample(ORIGIN, record), RESERVED).problems]
    assert found == ["reserved_token", "too_many_tags", "too_few_tags", "no_answer", "bad_record", "reserved_token"]


def test_what_is_found_first_is_what_refuses_a_record() -> None:
    record = {"conversations": [{"from": "human", "value": "<image> <|image_pad|>"}]}
    examined = examine(Sample(ORIGIN, record), RESERVED)
    assert [problem.category for problem in examined.problems] == ["reserved_token", "too_many_tags", "no_answer"]
    assert reason_of(record, "reserved_token") == examined.problems[0].reason
    assert examined.media == ()
    good = {"conversations": [{"from": "human", "value": "<image>"}, ANSWER], "image": "a.jpg"}
    assert examine(Sample(ORIGIN, good), RESERVED).media == build(good).media()


def test_a_record_of_which_nothing_can_be_read() -> None:
    for record in ([], {"image": 3}, {"conversations": "none", "image": 3}):
        examined = examine(Sample(ORIGIN, record), RESERVED)  # type: ignore[arg-type]
        assert examined.conversation.messages == ()
        assert {problem.category for problem in examined.problems} == {"bad_record"}
        assert len(examined.problems) == (2 if record else 1)
