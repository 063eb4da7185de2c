"""Hostile input made by hypothesis: how much of it, damaged files, and JSON of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EFFORTS = pytest.mark.parametrize("effort", [1, pytest.param(40, marks=pytest.mark.long)], ids=["quick", "long"])
"""So many times as many examples."""


def fuzz(check: Callable[[Any], None], inputs: st.SearchStrategy[Any], examples: int, effort: int) -> None:
    """Call ``check`` with inputs until one fails."""
    profile = settings(max_examples=examples * effort, database=None, suppress_health_check=list(HealthCheck))

    def once(value: Any) -> None:
        check(value)

    profile(given(value=inputs)(once))()


_EXTREMES = [
    b"\0" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\xff" * 8,
]
_CHANGES = ["cut", "flip", "write", "insert", "delete", "repeat"]
_edits = st.tuples(
    st.sampled_from(_CHANGES),
    st.floats(0, 1, exclude_max=True),  # where, as a share of the file
    st.integers(1, 64),
    st.one_of(st.sampled_from(_EXTREMES), st.binary(min_size=1, max_size=16)),
)


def _edit(content: bytes, edit: tuple[str, float, int, bytes]) -> bytes:
    change, share, number, new = edit
    place = int(share * len(content))
    before, after = content[:place], content[place:]
    if change == "cut":
        return before
    if change == "flip" and after:
        return before + bytes([after[0] ^ (1 << number % 8)]) + after[1:]
    if change == "delete":
        return before + after[number:]
    if change == "repeat":
        return before + after[:number] * 50 + after
    return before + new + (after if change == "insert" else after[len(new) :])


def damaged(contents: dict[str, bytes], edits: int = 4) -> st.SearchStrategy[tuple[str, bytes]]:
    """Name of a file and its content, changed in a few places, near its start as often as anywhere."""

    def spoil(name: str, changes: list[tuple[str, float, int, bytes]], head: bool) -> tuple[str, bytes]:
        content, tail = contents[name], b""
        if head:
            content, tail = content[:400], content[400:]
        for change in changes:
            content = _edit(content, change)
        return name, content + tail

    return st.builds(
        spoil, st.sampled_from(sorted(contents)), st.lists(_edits, min_size=1, max_size=edits), st.booleans()
    )


def deep(levels: int, ends: Any = 0) -> Any:
    """Return a list in a list in a list, and so on."""
    for _ in range(levels):
        ends = [ends]
    return ends


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    7,
    2**63,
    10**4000,
    0.5,
    -1e308,
    math.inf,
    -math.inf,
    math.nan,
    "",
    " ",
    "<image>",
    "<video>" * 300,
    "text",
    "\0",
    "\ud800",
    "../../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/a.png",
    "data:image/png;base64,AAAA",
    "a" * 5000,
    [],
    [None],
    [0],
    [[]],
    ["good.png", None],
    deep(300),
    {},
    {"": None},
    {"from": "human"},
    {"type": "image"},
    {"bytes": "AAAA", "path": 3},
    {"image": {"url": {"url": {}}}},
]
"""One of every kind of JSON, and those that are known to hurt."""

json_values = st.recursive(
    st.one_of(
        st.sampled_from(VALUES),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                "from value role content type image images video videos text url bytes frames fps nframes min_pixels "
                "max_pixels video_start video_end id system tools tool_calls reasoning_content name bbox_2d".split()
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
