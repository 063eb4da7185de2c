"""Annotation files: every format gives the same rows, and what is broken is found with its line."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl.data.sources import parquet as annotations_parquet
from qwenvl.data.sources import text_file as annotations_text
from qwenvl.data.sources.table import AnnotationTable, open_annotations
from qwenvl.data.types import DatasetSpec
from qwenvl.utils.errors import SampleError, UserError

RECORDS: list[dict[str, Any]] = [
    {"id": "first", "conversations": [{"from": "human", "value": "über <image>\n"}, {"from": "gpt", "value": "日本"}]},
    {"id": 7, "conversations": [{"from": "human", "value": 'say "hi"'}, {"from": "gpt", "value": "hi"}]},
    {"id": "third", "conversations": [{"from": "human", "value": "x" * 500}, {"from": "gpt", "value": "\u2028"}]},
]


def open_files(*paths: Path) -> AnnotationTable:
    return open_annotations(DatasetSpec("things", tuple(str(path) for path in paths), "/media"))


def records(table: AnnotationTable) -> list[Any]:
    return [sample.record for samples in table for sample in samples]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**row, "id": str(row["id"])} for row in RECORDS]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "indented.json": lambda path: path.write_text(json.dumps(RECORDS, indent=2, ensure_ascii=False), encoding="utf-8"),
    "bom.json": lambda path: path.write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8-sig"),
    "a.JSONL": lambda path: path.write_bytes(json_lines(RECORDS)),
    "no_newline_at_end.jsonl": lambda path: path.write_bytes(json_lines(RECORDS).rstrip()),
    "windows.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json_lines(RECORDS).replace(b"\n", b"\r\n")),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"\xef\xbb\xbf\n" + json_lines(RECORDS))),
    "array_without_suffix": lambda path: path.write_text("\n " + json.dumps(RECORDS)),
    "lines.txt": lambda path: path.write_bytes(json_lines(RECORDS)),
    "a.parquet": parquet,
    "parquet_without_suffix": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    table = open_files(tmp_path / name)
    assert [{**record, "id": str(record["id"])} for record in records(table)] == [
        {**record, "id": str(record["id"])} for record in RECORDS
    ]
    (sample,) = table[1]
    assert (sample.origin.id, sample.origin.dataset, sample.data_path) == ("7", "things", "/media")
    assert sample.origin.file == str(tmp_path / name)
    with pytest.raises(IndexError):
        table[3]
    with pytest.raises(IndexError):
        table[-1]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_tables_travel_to_other_processes(tmp_path: Path, name: str, method: str) -> None:
    """A pickled table carries no rows, and one shared by forked workers reads right in all of them at once."""
    if method == "spawn" and name not in ("a.json", "a.jsonl.gz", "a.parquet"):
        pytest.skip("a spawned process is slow to start; three formats stand for all")
    WRITERS[name](tmp_path / name)
    table = open_files(tmp_path / name)
    expected = records(table)
    assert b"say" not in pickle.dumps(table)
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        for got in pool.map(records, [table] * 4):
            assert got == expected


def read_in_turn(table: AnnotationTable, first: int, results: Any) -> None:
    rows = [*range(first, len(table)), *range(first)]
    results.put([row for row in rows * 3 if table[row][0].record != {"row": row, "text": "x" * row}])


def test_forked_workers_share_an_open_file(tmp_path: Path) -> None:
    """As the workers of a DataLoader do: the table is inherited, not pickled, with the file handle open."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([{"row": row, "text": "x" * row} for row in range(500)]))
    table = open_files(path)
    context = get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=read_in_turn, args=(table, 125 * number, results)) for number in range(4)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=900) for _ in workers] == [[], [], [], []]
    for worker in workers:
        worker.join(900)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=5)
blanks = st.lists(st.sampled_from([b"\n", b"  \n", b"\t\r\n", b"\r\n", b"\f\n"]), max_size=3).map(b"".join)


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(blanks, json_objects), min_size=1, max_size=8),
    end=blanks,
    bom=st.booleans(),
    data=st.data(),
)
def test_blank_lines_and_encodings_change_nothing(
    tmp_path: Path, rows: list[tuple[bytes, dict[str, Any]]], end: bytes, bom: bool, data: st.DataObject
) -> None:
    """JSON Lines with blank lines, BOM and CRLF anywhere; the array; and their gzip: the same rows and real lines."""
    content, lines = b"\xef\xbb\xbf" * bom, []
    for blank, row in rows:
        newline = data.draw(st.sampled_from([b"\n", b"\r\n", b" \n"]))
        content += blank
        lines.append(content.count(b"\n") + 1)
        content += json.dumps(row, ensure_ascii=data.draw(st.booleans())).encode() + newline
    content += end
    expected = [row for _, row in rows]
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content, 1))
    (tmp_path / "a.json").write_text(json.dumps(expected, indent=data.draw(st.none() | st.just(1))))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json"):
        assert records(open_files(tmp_path / name)) == expected
    table = open_files(tmp_path / "a.jsonl")
    assert [table[row][0].origin.line for row in range(len(table))] == lines
    assert [table.origin(row).line for row in range(len(table))] == lines


@settings(max_examples=25)
@given(rows=st.lists(json_objects, min_size=1, max_size=6), ascii_only=st.booleans())
def test_the_size_of_chunks_does_not_matter(tmp_path: Path, rows: list[dict[str, Any]], ascii_only: bool) -> None:
    text = "\n\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations_text, "_PIECE", 3)
        assert records(open_files(tmp_path / "a.jsonl")) == rows


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_text_are_given_as_they_stand(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    table = open_files(tmp_path / name)
    texts = [table.text(row) for row in range(len(table))]
    if "parquet" in name:
        assert texts == [None] * len(RECORDS)
    else:
        assert [json.loads(text) for text in texts if text is not None] == RECORDS
        assert all(text is not None and text == text.strip() for text in texts)


def test_files_follow_one_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(RECORDS[:2]))
    (tmp_path / "b.json").write_text(json.dumps(RECORDS[2:]))
    (tmp_path / "none.json").write_text("[]")
    table = open_files(tmp_path / "a.jsonl", tmp_path / "none.json", tmp_path / "b.json")
    assert records(table) == RECORDS
    assert table[2][0].origin.file.endswith("b.json") and table[2][0].origin.line == 1


def test_packed_rows_are_lists_of_samples(tmp_path: Path) -> None:
    (tmp_path / "packed.jsonl").write_bytes(json_lines([RECORDS[:2], RECORDS[2]]))
    (tmp_path / "packed.json").write_text(json.dumps([RECORDS[:2], RECORDS[2]]))
    for name in ("packed.jsonl", "packed.json"):
        first, second = open_files(tmp_path / name)
        assert [sample.record for sample in first] == RECORDS[:2]
        assert [sample.origin.member for sample in first] == [1, 2]
        assert "packed.json" in str(first[1].origin) and ":1, member 2 (id '7')" in str(first[1].origin)
        assert second[0].origin.member is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("3", "not a number"),
        ("null", "not null"),
        ('"x"', "not a string"),
        ("[1]", "not a number"),
        ("[]", "empty list"),
    ],
)
def test_a_row_must_be_an_object(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(f"[{{}}, {row}]")
    with pytest.raises(SampleError, match=reason) as caught:
        open_files(tmp_path / "a.json")[1]
    assert caught.value.category == "bad_record" and caught.value.origin.line == 2


def test_broken_json_in_the_middle_is_found_when_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 1, "b" 2}\n{"a": 1}\n')
    table = open_files(tmp_path / "a.jsonl")
    assert len(table) == 3
    with pytest.raises(SampleError) as caught:
        table[1]
    assert caught.value.category == "bad_json"
    assert "a.jsonl:3" in str(caught.value) and "column 14" in str(caught.value) and '"b" 2' in str(caught.value)


BROKEN: dict[str, tuple[str, bytes, list[str]]] = {
    "first line": ("a.jsonl", b'{"a" 1}\n{"a": 1}\n', ["line 1", "column 6"]),
    "last line, cut": ("a.jsonl", b'{"a": 1}\n{"a": "on', ["line 2", "column 7"]),
    "an array called lines": ("a.jsonl", b'[\n{"a": 1},\n{"a": 1}\n]\n', ["line 1", "the text ends there"]),
    "lines called an array": ("a.json", b'{"a": 1}\n{"a": 2}\n', ["name it .jsonl"]),
    "array, line and column": ("a.json", b'[\n{"a": 1},\n{"a": "\xc3\xa9", b}]', ["line 3: broken JSON at column 12"]),
    "array without its end": ("a.json", b'[{"a": 1}', ["Expecting ',' or ']'"]),
    "array of lines' name": ("a.jsonl", b'[\n {"a": 1}\n]', ["line 1: broken JSON", "holds one array: name it .json."]),
    "lines' name, one object": (
        "a.jsonl",
        b'{\n "a": 1\n}',
        ["line 1: broken JSON", "over several lines: write each on"],
    ),
    "list under a key": ("a.json", b'{"data": [{"a": 1}]}', ["one array of samples", "list under 'data': save that"]),
    "one sample": (
        "a.json",
        b'{"messages": [{"a": 1}]}',
        ["one array of samples", "if it is one sample, put [ ] around"],
    ),
    "printed by Python": ("a.json", b"[{'a': 1}]", ["line 1: broken JSON at column 3", "write it with json.dump."]),
    "comma at the end": ("a.json", b'[{"a": 1},]', ["line 1: broken JSON at column 11"]),
    "text after the array": ("a.json", b'[{"a": 1}] x', ["Extra data"]),
    "not UTF-8": ("a.json", b'[\n{"a": "\xff"}]', ["line 2 is not UTF-8"]),
    "not UTF-8 lines": ("a.jsonl", b'{"a": "\xff"}\n', ["line 1", "byte 8 is not UTF-8"]),
    "UTF-16": ("a.json", '[{"a": 1}]'.encode("utf-16"), ["UTF-16"]),
    "deep": ("a.jsonl", b"[" * 200_000, ["line 1"]),
    "deep array": ("a.json", b"[" * 200_000, ["item 1"]),
    "huge number": ("a.json", b"[" + b"1" * 5000 + b"]", ["item 1"]),
    "no rows": ("a.json", b" [ ] ", ["has no rows"]),
    "no lines": ("a.jsonl", b"\n \n", ["has no rows"]),
    "empty": ("a.json", b"", ["is empty"]),
    "gzip, cut": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], ["damaged or cut gzip"]),
    "not gzip": ("a.gz", b"hello", ["neither JSON, JSON Lines nor Parquet"]),
    "not Parquet": ("a.parquet", b"hello, world" * 9, ["not a whole Parquet file"]),
    "Parquet, cut": ("a.parquet", b"PAR1" + b"x" * 99, ["not a whole Parquet file"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_fail_on_opening(tmp_path: Path, case: str) -> None:
    name, content, expected = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_files(tmp_path / name)
    for words in ["'things'", str(tmp_path / name), *expected]:
        assert words in str(caught.value)


def test_the_ends_of_a_file_may_be_broken_where_it_is_to_be_checked(tmp_path: Path) -> None:
    lines = [b"{", *json_lines(RECORDS).splitlines(), b'{"conversations": [']
    (tmp_path / "a.jsonl").write_bytes(b"\r\n".join(lines))
    table = open_annotations(DatasetSpec("things", (str(tmp_path / "a.jsonl"),), ""), check_ends=False)
    assert [table.text(row) for row in range(len(table))] == lines
    for row in (0, len(table) - 1):
        with pytest.raises(SampleError, match="broken JSON"):
            table[row]
    assert [table[row][0].record for row in range(1, len(table) - 1)] == RECORDS


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'things'.*gone.json does not exist"):
        open_files(tmp_path / "gone.json")


def test_a_file_that_changes_is_not_read_at_old_offsets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(RECORDS))
    sent = pickle.dumps(open_files(path))
    path.write_bytes(json_lines(RECORDS[::-1] * 2))
    with pytest.raises(UserError, match="changed while it was in use"):
        pickle.loads(sent)[0]


def test_parquet_keeps_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(annotations_parquet, "CACHED_BYTES", 1)
    rows = annotations_parquet.ParquetRows(str(tmp_path / "a.parquet"))
    for row in (0, 2, 1, 0, 2):
        assert rows.record(row)["id"] == str(RECORDS[row]["id"])
        assert len(rows._groups) == 1


def test_opening_is_cheap(tmp_path: Path) -> None:
    """The index costs 8 bytes a row, and no row in the middle is parsed on opening."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"{broken}\n" * 50_000 + b'{"a": 1}\n')
    table = open_files(path)
    assert len(table) == 50_002 and len(pickle.dumps(table)) < 9 * 50_002
