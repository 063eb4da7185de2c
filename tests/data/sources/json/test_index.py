"""The index of annotation files: kept, shared, never taken for that of another content, rebuilt when damaged."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from qwenvl.data.sources import text_file as annotations_text
from qwenvl.data.sources.json import index as annotations_index
from qwenvl.data.sources.json import rows as annotations_json
from qwenvl.data.sources.table import AnnotationTable, open_annotations
from qwenvl.data.types import DatasetSpec
from qwenvl.utils.errors import UserError

ROWS = [{"row": row, "text": "x" * (row % 50)} for row in range(300)]
LAYOUTS = ("a.jsonl", "blank.jsonl", "a.json", "a.json.gz")


def write(path: Path, rows: list[Any] = ROWS) -> Path:
    """Write rows, with a time of change long ago: an index of what was written a moment ago is not kept."""
    lines = [json.dumps(row) for row in rows]
    text = "[" + ", ".join(lines) + "]" if ".json" in path.suffixes else "\n".join(lines)
    data = ("\n" * path.name.startswith("blank") + text).encode()
    if path.suffix == ".gz":
        import gzip

        data = gzip.compress(data)
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    return path


def open_file(path: Path, cache: Path) -> AnnotationTable:
    return open_annotations(DatasetSpec("things", (str(path),), ""), str(cache))


def records(table: AnnotationTable) -> list[Any]:
    return [sample.record for samples in table for sample in samples]


def index_files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def forbid_scanning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("the file was read from its beginning to its end")

    monkeypatch.setattr(annotations_json, "_feed", fail)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_is_scanned_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / name), tmp_path / "cache"
    first = open_file(path, cache)
    forbid_scanning(monkeypatch)
    again = open_file(path, cache)
    assert records(again) == records(first) == ROWS
    assert again.fingerprint == first.fingerprint
    assert [again.origin(row).line for row in range(3)] == [first.origin(row).line for row in range(3)]
    (tmp_path / "link").symlink_to(path)
    assert records(open_annotations(DatasetSpec("things", (str(tmp_path / "link"),), ""), str(cache))) == ROWS


def test_content_alone_makes_the_fingerprint(tmp_path: Path) -> None:
    same = [open_file(write(tmp_path / name), tmp_path / "cache").fingerprint for name in ("a.jsonl", "b.jsonl")]
    other = open_file(write(tmp_path / "c.jsonl", ROWS[1:]), tmp_path / "cache").fingerprint
    assert same[0] == same[1] != other


@pytest.mark.parametrize("restored", [False, True], ids=["new time", "old time restored"])
@pytest.mark.parametrize("name", LAYOUTS[:3])
def test_new_content_of_the_same_size_is_seen(tmp_path: Path, name: str, restored: bool) -> None:
    path, cache = write(tmp_path / name, [{"a": 1}, {"bb": 2}]), tmp_path / "cache"
    old = open_file(path, cache).fingerprint
    time.sleep(0.05)  # more than a tick of the clock that files get their times from
    write(path, [{"aa": 1}, {"b": 3}])
    if not restored:
        os.utime(path, ns=(10**18, 10**18 + 1))
    table = open_file(path, cache)
    assert records(table) == [{"aa": 1}, {"b": 3}]
    assert table.fingerprint != old


def test_what_was_written_a_moment_ago_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change right after it could carry the same time."""
    monkeypatch.setattr(annotations_text, "_CLOCK_TICK", 10**15)  # a busy machine takes its time to open the file
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    os.utime(path)
    assert records(open_file(path, cache)) == ROWS
    assert not index_files(cache)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-8],
    "cut in the header": lambda data: data[:100],
    "a byte of an offset": lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
    "longer": lambda data: data + bytes(8),
    "no number": lambda data: data[:256],
    "other text": lambda data: b"[1, 2]".ljust(256) + data[256:],
    "not text": lambda data: bytes(255 - byte for byte in data),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    open_file(path, cache)
    (index,) = index_files(cache)
    whole = index.read_bytes()
    index.write_bytes(DAMAGE[damage](whole))
    assert records(open_file(path, cache)) == ROWS
    assert [file.read_bytes() for file in index_files(cache)] == [whole]
    forbid_scanning(monkeypatch)
    assert records(open_file(path, cache)) == ROWS


def open_and_read(arguments: tuple[Path, Path]) -> tuple[list[Any], str]:
    table = open_file(*arguments)
    return records(table), table.fingerprint


def test_processes_that_open_a_file_at_once(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        results = list(pool.map(open_and_read, [(path, cache)] * 12))
    assert all(result == results[0] for result in results)
    assert results[0][0] == ROWS
    assert len(index_files(cache)) == 1


def test_an_index_that_others_have_mapped_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes find none and build it: the second one takes that of the first, and does not replace it."""
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    build = annotations_json._index_lines
    inodes = []

    def build_twice(text: Any) -> Any:
        monkeypatch.setattr(annotations_json, "_index_lines", build)
        open_file(path, cache)
        inodes.append(index_files(cache)[0].stat().st_ino)
        return build(text)

    monkeypatch.setattr(annotations_json, "_index_lines", build_twice)
    assert records(open_file(path, cache)) == ROWS
    assert [file.stat().st_ino for file in index_files(cache)] == inodes


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cache_that_cannot_be_written_is_said_once(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.write_text("a file, where a folder would have to be made")
    first, second = write(tmp_path / name), write(tmp_path / f"second_{name}")
    annotations_index._warn_unwritable.cache_clear()
    with caplog.at_level(logging.WARNING):
        table = open_file(first, cache)
        assert records(table) == records(open_file(second, cache)) == ROWS
    (warning,) = caplog.messages
    assert str(cache) in warning
    assert "--data_cache_dir" in warning
    assert records(pickle.loads(pickle.dumps(table))) == ROWS


@pytest.mark.parametrize("name", LAYOUTS)
def test_pickling_sends_paths(tmp_path: Path, name: str) -> None:
    table = open_file(write(tmp_path / name, ROWS * 20), tmp_path / "cache")
    sent = pickle.dumps(table)
    assert len(sent) < 2000
    assert records(pickle.loads(sent)) == ROWS * 20


def test_a_table_survives_the_loss_of_its_index(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    table = open_file(write(tmp_path / "a.jsonl"), cache)
    sent = pickle.dumps(table)
    for file in index_files(cache):
        file.unlink()
    assert records(table) == records(pickle.loads(sent)) == ROWS


def test_a_file_that_changed_is_not_read_by_the_index_of_its_new_content(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    sent = pickle.dumps(open_file(path, cache))
    write(path, ROWS[::-1])
    os.utime(path, ns=(10**18, 10**18 + 1))
    open_file(path, cache)
    with pytest.raises(UserError, match="changed while it was in use"):
        pickle.loads(sent)[0]


def test_a_file_that_changes_while_it_is_scanned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.jsonl"), tmp_path / "cache"
    build = annotations_json._index_lines

    def build_and_change(text: Any) -> Any:
        index = build(text)
        path.write_bytes(b"{}")
        return index

    monkeypatch.setattr(annotations_json, "_index_lines", build_and_change)
    with pytest.raises(UserError, match="changed while it was in use"):
        open_file(path, cache)
    assert not index_files(cache)


OPEN_AND_MEASURE = """
import sys
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec

def kilobytes(key, file="/proc/self/status"):
    return next(int(line.split()[1]) for line in open(file) if line.startswith(key + ":"))

before = kilobytes("VmRSS")
table = open_annotations(DatasetSpec("things", (sys.argv[1],), ""), sys.argv[2])
assert len(table) == 200_000, len(table)
print(kilobytes("VmHWM") - before, kilobytes("Anonymous", "/proc/self/smaps_rollup"), before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_opening_takes_little_memory(tmp_path: Path, name: str) -> None:
    """200,000 rows, 120 MB: the peak while they are counted, and what stays once the index is mapped."""
    line = json.dumps({"text": "x" * 585})
    with open(tmp_path / name, "w") as file:
        file.write("[" * name.endswith(".json"))
        separator = ",\n" if name.endswith(".json") else "\n"
        file.writelines([separator * (block > 0) + separator.join([line] * 1000) for block in range(200)])
        file.write("]" * name.endswith(".json"))
    os.utime(tmp_path / name, ns=(10**18, 10**18))
    command = [sys.executable, "-c", OPEN_AND_MEASURE, str(tmp_path / name), str(tmp_path / "cache")]
    root = Path(__file__).resolve().parents[4]
    measured = []
    for _ in range(2):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        measured.append([int(number) / 1024 for number in done.stdout.split()])
    (first_peak, _, _), (later_peak, _, _) = measured
    assert first_peak < 40, measured
    assert later_peak < 10, measured
