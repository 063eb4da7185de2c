"""Annotation files that are cut, damaged, nested, huge or not what they seem: a message, never a crash."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwenvl.data.dataset import ConversationDataset, open_tables
from qwenvl.data.sources import parquet as annotations_parquet
from qwenvl.data.sources import text_file as annotations_text
from qwenvl.data.types import DatasetSpec
from qwenvl.utils.errors import SampleError, UserError
from tests.fuzz.doors import Doors
from tests.fuzz.fuzz import EFFORTS, damaged, deep, fuzz

RECORDS: list[dict[str, Any]] = [
    {
        "id": f"über {number}",
        "image": ["good.png"],
        "conversations": [{"from": "human", "value": f"<image>\nWhat {number}?"}, {"from": "gpt", "value": 'a\\"b'}],
    }
    for number in range(6)
]


def parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), stream, row_group_size=2)
    return stream.getvalue()


LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode()
FILES = {
    "a.jsonl": LINES,
    "a.json": json.dumps(RECORDS, ensure_ascii=False, indent=1).encode(),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.parquet": parquet(),
    "a": LINES,
}


@EFFORTS
def test_damaged_files_are_refused_or_read_row_by_row(doors: Doors, effort: int) -> None:
    def check(case: tuple[str, bytes]) -> None:
        annotations = doors.write(*case)
        doors.check(annotations)
        doors.train(annotations)

    fuzz(check, damaged(FILES), 120, effort)


def nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    return opening * levels + "0" + closing * levels


ROWS = {
    "deep lists": nested(100_000),
    "deep objects": nested(100_000, '{"a":', "}"),
    "deep lists in a sample": json.dumps({**RECORDS[0], "image": 0}).replace(
        '"image": 0', f'"image": {nested(100_000)}'
    ),
    "deep tools": json.dumps({**RECORDS[0], "tools": [{"name": deep(900)}]}),
    "deep tool calls": json.dumps(
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"a": deep(900)}]}]}
    ),
    "deep boxes": json.dumps(
        {
            **RECORDS[0],
            "bbox_format": "pixel",
            "conversations": [
                RECORDS[0]["conversations"][0],
                {"from": "gpt", "tool_calls": [{"bbox_2d": [1, deep(900)]}, deep(900)]},
            ],
        }
    ),
    "a number of 5000 digits": '{"id": ' + "9" * 5000 + "}",
    "a number beyond all floats": json.dumps({**RECORDS[0], "id": 0}).replace('"id": 0', '"id": 1e400'),
    "numbers that are none": json.dumps({**RECORDS[0], "fps": float("nan"), "image": float("inf")}),
    "an endless identifier": json.dumps({"id": "x" * 1_000_000}),
    "an endless key": json.dumps({"x" * 1_000_000: 1}),
    "an endless role": json.dumps({"conversations": [{"from": "x" * 1_000_000, "value": "x"}]}),
    "an endless setting": json.dumps({**RECORDS[0], "image": {"image": "good.png", "x" * 1_000_000: 1}}),
    "an endless format": json.dumps({**RECORDS[0], "bbox_format": "x" * 1_000_000}),
    "an endless path": json.dumps({**RECORDS[0], "image": "x/" * 500_000}),
    "boxes without an end": json.dumps(
        {
            **RECORDS[0],
            "bbox_format": "pixel",
            "conversations": [
                RECORDS[0]["conversations"][0],
                {"from": "gpt", "value": "<|box_start|>" * 20_000 + '"bbox_2d": [' * 20_000 + "\\" * 20_000},
            ],
        }
    ),
    "a box of a huge exponent": json.dumps(
        {
            **RECORDS[0],
            "bbox_format": "pixel",
            "conversations": [
                RECORDS[0]["conversations"][0],
                {"from": "gpt", "value": '"bbox_2d": [1e999999999, 1, 2, 3]'},
            ],
        }
    ),
    "tags without an end": json.dumps({"conversations": [{"from": "human", "value": "<image>" * 20_000}]}),
    "half a character": '{"id": "\\ud800", "conversations": [{"from": "\\udfff"}]}',
}


@pytest.mark.parametrize("layout", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("case", ROWS)
def test_a_hostile_row_costs_only_itself(doors: Doors, case: str, layout: str) -> None:
    good = json.dumps(RECORDS[0])
    rows = [good, ROWS[case], good]
    text = "\n".join(rows) if layout == "a.jsonl" else f"[{', '.join(rows)}]"
    annotations = doors.write(layout, text.encode())
    said = doors.train(annotations)
    assert len(said) <= 1
    assert doors.check(annotations) == 1  # a duplicate, at least


def test_a_gzip_bomb_is_refused(
    doors: Doors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(annotations_text, "DECOMPRESSED_BYTES", 8 << 20)
    annotations = doors.write("a.jsonl.gz", gzip.compress(b" " * (9 << 20)))
    assert "holds more than 8 MiB of text" in doors.train(annotations)[0]
    assert doors.check(annotations) == 2
    assert "gunzip" in caplog.text


def test_parquet_that_promises_more_than_it_holds(doors: Doors, tmp_path: Path) -> None:
    """The footer of one file behind the pages of another one."""
    content = bytearray(parquet())
    middle = content.index(b"good.png") - 40
    content[middle : middle + 80] = bytes(80)
    said = doors.train(doors.write("a.parquet", bytes(content)))
    assert said and all("is not a whole Parquet file" in message for message in said)


def repeating(length: int, times: int) -> bytes:
    """A small Parquet file whose second row of three repeats one text."""
    indices = pa.array([0, 0, *[1] * times, 0, 0], pa.int32())
    texts = pa.DictionaryArray.from_arrays(indices, pa.array(["short", "x" * length]))
    roles = pa.array(["human", "gpt"] * (times // 2 + 2))
    turns = pa.StructArray.from_arrays([roles, texts], ["from", "value"])
    rows = pa.ListArray.from_arrays([0, 2, times + 2, times + 4], turns)
    stream = io.BytesIO()
    pq.write_table(pa.table({"conversations": rows}), stream, compression="zstd", store_schema=False)
    return stream.getvalue()


def test_a_text_that_a_row_of_parquet_repeats_without_end(doors: Doors) -> None:
    content = repeating(length=1 << 20, times=500)
    assert len(content) < 10_000
    annotations = doors.write("a.parquet", content)
    [said] = doors.train(annotations)
    assert "a.parquet:2" in said and "the row takes 500 MiB of memory; the limit is 256 MiB" in said
    assert doors.check(annotations) == 1


def test_a_group_of_parquet_rows_beyond_all_memory(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations_parquet, "GROUP_BYTES", 100)
    said = doors.train(doors.write("a.parquet", parquet()))
    assert said and all("Write it with smaller row groups" in message for message in said)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="the error of a disk is made with Linux's /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("skips", [True, False])
def test_a_disk_that_fails_stops_the_run_in_one_message(doors: Doors, name: str, skips: bool) -> None:
    annotations = doors.write(name, FILES[name])
    spec = DatasetSpec("hostile", (str(annotations),), str(doors.folder / "media"))
    dataset = ConversationDataset(open_tables([spec], seed=0, cache_dir=str(doors.folder)), doors.encoder, skips)
    assert dataset[0].error is None
    nothing = os.open("/proc/self/mem", os.O_RDONLY)  # where there is no memory, reading it is an I/O error
    for file in Path("/proc/self/fd").iterdir():
        if os.path.realpath(file) == str(annotations):
            os.dup2(nothing, int(file.name))
    os.close(nothing)
    error = dataset[4].error
    assert isinstance(error, UserError) and not isinstance(error, SampleError)
    assert f"{annotations}:5: the annotation file cannot be read any more (Input/output error)" in str(error)
