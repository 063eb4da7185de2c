from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.config.parsing.expressions import LARGEST_RESULT, evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("576*32*32", 576 * 32 * 32),
        (r"576\*28\*28", 576 * 28 * 28),
        ("28*28*16", 12544),
        ("2**20", 2**20),
        ("1e6", 1e6),
        ("1_000", 1000),
        (" (2 + 3) * -4 // 3 ", -7),
        ("1e-5", 1e-5),
        ("+7 - 2", 5),
    ],
)
def test_values(text: str, value: float) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "abc", "__import__('os')", "True", "'1'", "[1]", "1;2", "f(2)", "1/3", "1 if 1 else 2", "2**64", "9**9**9"]
    + ["2**-1", "1//0", "1e999", "nan", "10**30", "(" * 90 + "1", "1+" * 200 + "1", "\0", "1j", "x.y"],
)
def test_refuses_what_is_not_plain_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        evaluate(text)


@given(st.text(alphabet="0123456789+-*/() e.x", max_size=110))
def test_any_text_gives_a_bounded_number_or_one_kind_of_error(text: str) -> None:
    try:
        value = evaluate(text)
    except ValueError:
        return
    assert abs(value) <= LARGEST_RESULT


@given(st.integers(-(2**31), 2**31), st.integers(0, 2**31))
def test_agrees_with_python(left: int, right: int) -> None:
    assert evaluate(f"{left}*({right}+1)") == left * (right + 1)
