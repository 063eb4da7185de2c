from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.evaluate.scoring import Box, guess_rate, is_right, overlap, read_box

edges = st.integers(0, 1000)
boxes = st.tuples(edges, edges, edges, edges).map(
    lambda box: (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]) + 1, max(box[1], box[3]) + 1)
)


def as_answer(box: Box) -> str:
    return json.dumps({"bbox_2d": list(box), "label": "x"})


@given(boxes, boxes)
def test_overlap_is_a_share_and_symmetric(first: Box, second: Box) -> None:
    assert 0 <= overlap(first, second) <= 1
    assert overlap(first, second) == overlap(second, first)
    assert overlap(first, first) == 1


@pytest.mark.parametrize(
    ("other", "expected"),
    [((0, 0, 10, 5), 0.5), ((5, 0, 15, 10), 1 / 3), ((10, 0, 20, 10), 0), ((3, 3, 3, 3), 0), ((8, 8, 2, 2), 0)],
)
def test_overlap_by_hand(other: Box, expected: float) -> None:
    assert overlap((0, 0, 10, 10), other) == pytest.approx(expected)


@given(boxes)
def test_boxes_survive_writing_and_reading(box: Box) -> None:
    assert read_box(as_answer(box)) == box
    assert is_right(as_answer(box), as_answer(box))


@pytest.mark.parametrize(
    "answer", ["", "7", "{", "[1, 2, 3, 4]", '{"bbox_2d": [1, 2, 3]}', '{"bbox_2d": [1, 2, 3, "4"]}', '{"box": 1}']
)
def test_what_is_no_box(answer: str) -> None:
    assert read_box(answer) is None
    assert not is_right(answer, as_answer((1, 2, 3, 4)))


def test_half_an_overlap_is_enough_and_less_is_not() -> None:
    expected = as_answer((0, 0, 100, 100))
    assert is_right(as_answer((0, 0, 100, 50)), expected)
    assert not is_right(as_answer((0, 0, 100, 49)), expected)


@pytest.mark.parametrize(
    ("answer", "right"), [("7", True), (" 7\n", True), ("17", False), ("", False), ("seven", False)]
)
def test_words_must_be_the_same(answer: str, right: bool) -> None:
    assert is_right(answer, "7") == right


def test_chance_by_hand() -> None:
    assert guess_rate(["a", "a", "b"]) == pytest.approx(2 / 6)  # of six ordered pairs, two are equal
    assert guess_rate(["a"]) == 0
