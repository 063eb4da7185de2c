"""Scanning JSON piece by piece: the same items and lines as the json module finds, wherever the pieces end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenvl.data.sources import text_file as annotations_text
from qwenvl.data.sources.json.scan import ArrayScanner, LineScanner
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec
from qwenvl.utils.errors import SampleError, UserError

# What scanning looks at, beside other text: runs of backslashes, quotes and brackets inside strings.
texts = st.text() | st.text(alphabet='"\\[]{},:\n yYé')
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)
arrays = st.lists(values, max_size=8)
spaces = st.text(alphabet=" \t\r\n", max_size=4)


@st.composite
def dumped(draw: st.DrawFn) -> tuple[list[Any], str]:
    """Draw an array and a text of it."""
    array = draw(arrays)
    comma, colon = (draw(spaces) + mark + draw(spaces) for mark in ",:")
    indent = draw(st.none() | st.integers(0, 3))
    text = json.dumps(array, ensure_ascii=draw(st.booleans()), indent=indent, separators=(comma, colon))
    return array, draw(spaces) + text.encode("utf-8", "replace").decode() + draw(spaces)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@settings(max_examples=150)
@given(case=dumped(), size=st.integers(1, 200), start=st.integers(0, 9))
def test_items_are_those_of_the_json_module(case: tuple[list[Any], str], size: int, start: int) -> None:
    array, text = case
    data = text.encode()
    scanner = ArrayScanner(start)
    for piece in pieces(data, size):
        scanner.feed(piece)
    found = scanner.finish()
    assert found is not None
    offsets = (found[0] - start).tolist()
    items = [data[first : following - 1] for first, following in pairwise(offsets)]
    assert repr([json.loads(item) for item in items]) == repr(json.loads(text))
    scalars = [number for number, item in enumerate(array) if not isinstance(item, list | dict)]
    assert found[1].tolist() == scalars


@settings(max_examples=100)
@given(before=st.integers(0, 200), run=st.integers(0, 200), size=st.integers(1, 260))
def test_runs_of_backslashes_of_any_length(before: int, run: int, size: int) -> None:
    """Longer than a word of 64, across words and across pieces."""
    array = ["x" * before + "\\" * run + '"', {"a": "\\" * run}, []]
    data = json.dumps(array).encode()
    scanner = ArrayScanner(0)
    for piece in pieces(data, size):
        scanner.feed(piece)
    found = scanner.finish()
    assert found is not None
    assert [json.loads(data[a : b - 1]) for a, b in pairwise(found[0])] == array


@settings(max_examples=100)
@given(data=st.binary() | st.text(alphabet='{["\n\r x').map(str.encode), size=st.integers(1, 70))
def test_lines_are_those_between_newlines(data: bytes, size: int) -> None:
    scanner = LineScanner(0)
    for piece in pieces(data, size):
        scanner.feed(piece)
    offsets, doubtful = scanner.finish()
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    assert [data[first : following - 1] for first, following in pairwise(offsets)] == lines
    assert doubtful.tolist() == [number for number, line in enumerate(lines) if line[:1] not in (b"{", b"[")]


def read_all(path: Path) -> tuple[list[Any], list[SampleError]]:
    table = open_annotations(DatasetSpec("things", (str(path),), ""))
    rows: list[Any] = []
    errors: list[SampleError] = []
    for row in range(len(table)):
        try:
            rows += [sample.record for sample in table[row]]
        except SampleError as error:
            errors.append(error)
    return rows, errors


def as_rows(array: list[Any]) -> list[Any]:
    """What a table makes of an array: objects, and those of the lists that hold nothing else."""
    packed = [item if isinstance(item, list) and item else [item] for item in array]
    return [row for rows in packed if all(isinstance(row, dict) for row in rows) for row in rows]


@settings(max_examples=60)
@given(
    case=dumped(),
    place=st.floats(0, 1),
    removed=st.integers(0, 3),
    added=st.text(alphabet='"\\[]{}, \nxé1', max_size=2),
    size=st.integers(1, 80),
)
@example(([{}], '[{} {"a": 1}]'), 0, 0, "", 80)
@example(([{}], '[{}, {"a": 1},]'), 0, 0, "", 80)
@example(([{}], '[{},, {"a": 1}]'), 0, 0, "", 80)
@example(([{}], '[,{"a": 1}]'), 0, 0, "", 80)
@example(([{}], '[{"a": [1}, {}]'), 0, 0, "", 80)
def test_what_is_no_array_is_not_read_as_one(
    tmp_path: Path, case: tuple[list[Any], str], place: float, removed: int, added: str, size: int
) -> None:
    """Whatever is changed in a text: it is still an array, or opening or reading it fails."""
    text = case[1]
    cut = int(place * len(text))
    text = text[:cut] + added + text[cut + removed :]
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        array = json.loads(text)
    except ValueError:
        array = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations_text, "_PIECE", size)
        if isinstance(array, list) and array:
            rows, errors = read_all(path)
            assert repr(rows) == repr(as_rows(array))
            assert not any(error.category == "bad_json" for error in errors)
            return
        try:
            _, errors = read_all(path)
        except UserError:
            return
    assert any(error.category == "bad_json" for error in errors), text


@settings(max_examples=60)
@given(case=dumped(), place=st.floats(0, 1), size=st.integers(1, 80))
def test_the_mistake_stands_where_the_json_module_finds_it(
    tmp_path: Path, case: tuple[list[Any], str], place: float, size: int
) -> None:
    """A file that is cut off: with the line and column, whatever the size of pieces."""
    text = case[1][: int(place * len(case[1]))].rstrip()
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations_text, "_PIECE", size)
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            expected = error
        else:
            return
        with pytest.raises(UserError) as caught:
            read_all(path)
    if text:
        assert f": line {expected.lineno}: broken JSON at column {expected.colno}:" in str(caught.value)
