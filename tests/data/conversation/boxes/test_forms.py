"""The written forms of boxes and points: which numbers of a text are coordinates, and which are not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qwenvl.data.conversation.boxes.forms import COUNTS, rewrite, rewrite_value


def lettered(text: str) -> str:
    """Write a letter for each coordinate: what changes is seen to the character."""
    letters = iter("abcdefghijklmnop")

    def write(items: Sequence[str], kind: str, shown: str) -> Sequence[str]:
        assert len(items) in COUNTS[kind], kind
        assert shown in text
        return [next(letters) for _ in items]

    return rewrite(text, write)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # cookbooks: computer_use, mobile_use, 2d_grounding
        ('{"action": "left_click", "coordinate": [15, 11]}', '{"action": "left_click", "coordinate": [a, b]}'),
        ('"coordinate": [1, 2], "coordinate2": [3, 4]', '"coordinate": [a, b], "coordinate2": [c, d]'),
        ('{"point": [1, 2], "bbox": [1, 2, 3, 4]}', '{"point": [a, b], "bbox": [c, d, e, f]}'),
        (r"{\"coordinate\": [1, 2]}", r"{\"coordinate\": [a, b]}"),
        ("{'coordinate': (1, 2)}", "{'coordinate': (a, b)}"),
        ('"coordinate": "[1, 2]"', '"coordinate": "[a, b]"'),
        ('"bbox_2d": [[1,2,3,4], [5, 6,7,8]]', '"bbox_2d": [[a,b,c,d], [e, f,g,h]]'),
        # UI-TARS
        ("click(start_box='<|box_start|>(1,2)<|box_end|>')", "click(start_box='<|box_start|>(a,b)<|box_end|>')"),
        ("drag(start_box='(1,2)', end_box='( 3, 4 )')", "drag(start_box='(a,b)', end_box='( c, d )')"),
        ("click(start_box='[1, 2, 3, 4]')", "click(start_box='[a, b, c, d]')"),
        ("click(start_box='(1,2),(3,4)')", "click(start_box='(a,b),(c,d)')"),
        ("click(point='<point>1 2</point>')", "click(point='<point>a b</point>')"),
        ("click(start_box='<bbox>1 2 3 4</bbox>')", "click(start_box='<bbox>a b c d</bbox>')"),
        # OS-Atlas, Qwen-VL, InternVL
        ("CLICK <point>[[1, 2]]</point>", "CLICK <point>[[a, b]]</point>"),
        ("<ref>cat</ref><box>(1,2),(3,4)</box>", "<ref>cat</ref><box>(a,b),(c,d)</box>"),
        ("<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", "<box>[[a, b, c, d], [e, f, g, h]]</box>"),
        # calls
        ("click(1, 2)", "click(a, b)"),
        ("pyautogui.click(x=1.5, y = 2)", "pyautogui.click(x=a, y = b)"),
        ("pyautogui.moveTo(1, 2, duration=3)", "pyautogui.moveTo(a, b, duration=3)"),
        ("tap((1, 2)) click([3, 4])", "tap((a, b)) click([c, d])"),
        ("swipe(1, 2, 3, 4)", "swipe(a, b, c, d)"),
    ],
)
def test_forms_that_are_read(text: str, expected: str) -> None:
    assert lettered(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "drag(10, 20) scroll(3, 4) doubleclicks(1, 2) click(1)",  # distances, other functions
        '{"coordinate": null, "point": {"x": 1}, "bbox_3d": [1, 2], "time": 12}',
        '"points": [[1, 2]], "mybbox": [1, 2, 3, 4], (1,2),(3,4) [1, 2, 3, 4]',
        "coordinate: [1, 2], point is (3, 4)",
        '"coordinate": [x, y]',
        "<|box_start|>(1,2)<|quad_end|> <point>1 2</box> <|box_start|>(1,2)",
        "version 1.2, 3 of 4; 12:30",
    ],
)
def test_numbers_that_are_left_alone(text: str) -> None:
    assert lettered(text) == text


def test_a_text_that_stands_alone_under_a_key() -> None:
    def write(items: Sequence[str], kind: str, shown: str) -> Sequence[str]:
        return [f"{kind}{number}" for number, _ in enumerate(items)]

    assert rewrite_value("(1,2)", "start_box", write) == "(start_box0,start_box1)"
    assert rewrite_value("[1, 2]", "coordinate", write) == "[coordinate0, coordinate1]"
    assert rewrite_value("the middle, 1 2", "point", write) == "the middle, 1 2"


@pytest.mark.parametrize(
    "text", ['"bbox":' * 20_000, "<|box_start|>" * 20_000, "click(" * 20_000, '"point": [' * 20_000]
)
def test_long_texts_take_linear_time(text: str) -> None:
    """A quadratic search would take minutes."""
    assert lettered(text) == text
