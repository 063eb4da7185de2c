"""Counted lengths on disk: the same numbers, counted anew when what they depend on changes, whole after any damage."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.packing.length_cache import RECORD, LengthCache
from qwenvl.data.packing.lengths import RowLengths, measure_lengths
from qwenvl.data.sample_stats import MEASURES
from tests.data.counting import encoder_of, table_of, talk

RECORDS = [
    talk("<image>?" if number % 2 else "Q" * number, "It. " * number, image=["a.png"] * (number % 2), id=f"n{number}")
    for number in range(1, 25)
]
RECORDS += [[RECORDS[3], RECORDS[20]], [RECORDS[5]]]


@pytest.fixture
def media(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 96)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the ids of the samples that are counted in this process."""
    found: list[str] = []
    measure = SampleEncoder.measure

    def noting(self: SampleEncoder, sample: Any) -> Any:
        found.append(str(sample.origin.id))
        return measure(self, sample)

    monkeypatch.setattr(SampleEncoder, "measure", noting)
    return found


Open = Callable[..., ConversationDataset]


@pytest.fixture
def opened(tiny_checkpoint: Callable[..., Path], media: Path) -> Open:
    """Function that opens RECORDS, or others, under flags."""

    def open_dataset(
        records: Any = RECORDS, rows: Any = None, checkpoint: Path | None = None, limit: int = 4096, **flags: Any
    ) -> ConversationDataset:
        encoder = encoder_of(checkpoint or tiny_checkpoint("qwen3_vl"), limit, **flags)
        return ConversationDataset([table_of(records, media, rows)], encoder, skip_bad_samples=True)

    return open_dataset


def measure(dataset: ConversationDataset, cache: Path | None) -> RowLengths:
    return measure_lengths(dataset, cache, workers=0)


def assert_equal(one: RowLengths, other: RowLengths) -> None:
    assert one.measures.tolist() == other.measures.tolist()
    assert one.events == other.events


def test_the_second_time_nothing_is_counted(opened: Open, cache: Path, counted: list[str]) -> None:
    first = measure(opened(), cache)
    assert len(counted) == 27
    second = measure(opened(), cache)
    assert len(counted) == 27
    assert_equal(first, second)
    assert_equal(first, measure(opened(), None))


def test_a_share_of_a_dataset_shares_what_was_counted(opened: Open, cache: Path, counted: list[str]) -> None:
    """Another percentage, another name, an evaluation split: what one run has counted serves the others."""
    measure(opened(rows=[1, 4, 4, 7]), cache)
    assert counted == ["n2", "n5", "n8"]
    measured = measure(opened(rows=[0, 1, 4]), cache)
    assert counted == ["n2", "n5", "n8", "n1"]
    assert_equal(measured, measure(opened(rows=[0, 1, 4]), None))


@pytest.mark.parametrize("limit", [20, 45, 60, 75, 90, 4096])
@pytest.mark.parametrize("overlength", ["drop", "error"])
def test_the_limit_is_applied_to_what_was_counted_under_another(
    opened: Open, cache: Path, limit: int, overlength: str
) -> None:
    """Only packed rows that became too long are counted again; what is left out, and why, is the same."""
    measure(opened(), cache)
    fresh = outcome(opened(limit=limit, overlength=overlength), None)
    assert outcome(opened(limit=limit, overlength=overlength), cache) == fresh
    measure(opened(), cache)
    assert outcome(opened(limit=limit, overlength=overlength), cache) == fresh


def outcome(dataset: ConversationDataset, cache: Path | None) -> Any:
    try:
        measured = measure(dataset, cache)
    except ValueError as error:
        return str(error)
    return measured.measures.tolist(), measured.events


def another_template(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>user", "<|im_start|>user now"))
    template.write_text(template.read_text() + "{# changed #}")
    return folder


def another_tokenizer(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-40]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


CHANGES: dict[str, dict[str, Any]] = {
    "annotations": {"records": [*RECORDS[:-1], RECORDS[0]]},
    "max_pixels": {"max_pixels": 48 * 64},
    "min_pixels": {"min_pixels": 64 * 96},
    "video limits": {"video_max_frames": 6},
    "template arguments": {"add_vision_id": True},
    "template": {"checkpoint": another_template},
    "tokenizer": {"checkpoint": another_tokenizer},
    "truncation": {"overlength": "truncate_turns"},
    "media from the network": {"allow_remote_media": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_lengths_depend_on_makes_them_be_counted_anew(
    opened: Open,
    cache: Path,
    counted: list[str],
    change: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    flags = dict(CHANGES[change])
    if "checkpoint" in flags:
        flags["checkpoint"] = flags["checkpoint"](tiny_checkpoint("qwen3_vl"), tmp_path / "other")
    measure(opened(), cache)
    counted.clear()
    changed = measure(opened(**flags), cache)
    assert len(counted) == sum(len(row) if isinstance(row, list) else 1 for row in flags.get("records", RECORDS))
    assert_equal(changed, measure(opened(**flags), None))
    counted.clear()
    measure(opened(), cache)
    assert counted == []  # both are kept


def test_turns_are_cut_for_the_limit_they_were_cut_for(opened: Open, cache: Path, counted: list[str]) -> None:
    long = talk("Q", "A")
    long["conversations"] = long["conversations"] * 6
    for limit in (40, 60, 4096):
        flags = {"records": [long], "overlength": "truncate_turns", "limit": limit}
        assert_equal(measure(opened(**flags), cache), measure(opened(**flags), None))
        assert 10 < measure(opened(**flags), cache).measures["tokens"][0] <= limit


def test_a_row_with_a_problem_is_looked_at_in_every_run(
    opened: Open, cache: Path, media: Path, counted: list[str]
) -> None:
    late = talk("<image>?", "A", image="later.png", id="late")
    records = [RECORDS[0], late, [RECORDS[1], "no record"], [RECORDS[1], late]]
    for _ in range(2):
        measured = measure(opened(records), cache)
        assert [event.record["category"] for event in measured.events] == ["missing_file", "bad_record", "missing_file"]
        assert measured.measures["samples"].tolist() == [1, 0, 0, 1]
    Image.new("RGB", (64, 64)).save(media / "later.png")
    measured = measure(opened(records), cache)
    assert measured.measures["samples"].tolist() == [1, 1, 0, 2]
    counted.clear()
    assert_equal(measured, measure(opened(records), cache))
    assert "late" not in counted


@pytest.mark.parametrize("damage", ["cut", "grown", "emptied", "bytes", "moved"])
def test_damage_is_found_said_and_counted_anew(
    opened: Open, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = measure(opened(), cache)
    (file,) = (cache / "lengths").iterdir()
    content, size = bytearray(file.read_bytes()), RECORD.itemsize
    if damage == "cut":
        del content[5 * size + 3 :]
    elif damage == "grown":
        content += b"more"
    elif damage == "emptied":
        content.clear()
    elif damage == "bytes":
        content[3 * size + 8] ^= 1
    else:
        content[3 * size : 4 * size] = content[4 * size : 5 * size]
    file.write_bytes(content)
    caplog.clear()
    assert_equal(measure(opened(), cache), before)
    assert "counted again" in caplog.text
    assert len(file.read_bytes()) == len(RECORDS) * size
    caplog.clear()
    assert_equal(measure(opened(), cache), before)
    assert "counted again" not in caplog.text


def test_rows_that_are_written_leave_the_others_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also those between them, and those that are not counted yet, which are no damage."""
    path, measures = tmp_path / "counts", np.array([(1, *[row] * (len(MEASURES) - 1)) for row in range(9)], MEASURES)
    for rows in ([2, 3], [0, 1, 5, 7], [4]):
        LengthCache(path, 9).write(np.array(rows), measures[rows])
    found = LengthCache(path, 9).read()
    known = [0, 1, 2, 3, 4, 5, 7]
    assert found[known].tolist() == measures[known].tolist()
    assert found["samples"][[6, 8]].tolist() == [0, 0]
    assert caplog.text == ""
    assert path.stat().st_size == 9 * RECORD.itemsize


def test_what_cannot_be_read_is_said_and_counted_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind("counts")  # no file that can be opened, of no bytes, as the counts of no rows are
        assert len(LengthCache(tmp_path / "counts", 0).read()) == 0
    assert "cache of counted lengths cannot be read: " in caplog.text
    assert len(LengthCache(tmp_path / "none", 5).read()) == 5


def test_a_folder_that_cannot_be_written_is_said_once(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("qwenvl.data.packing.lengths._ROWS_A_TASK", 4)
    assert_equal(measure(opened(), tmp_path / "file"), measure(opened(), None))
    assert caplog.text.count("cannot be written") == 1


def test_what_was_done_is_said(opened: Open, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qwenvl")
    measure(opened(rows=range(10)), cache)
    measure(opened(), cache)
    said = [message for message in caplog.messages if message.startswith("Lengths:")]
    assert said[0].startswith("Lengths: 10 rows counted, 0 from the cache, in ")
    assert said[1].startswith("Lengths: 16 rows counted, 10 from the cache, in ")


numbers = st.integers(0, 2**62)


@given(
    st.dictionaries(st.integers(0, 30), st.tuples(*[numbers] * (len(MEASURES) - 1)), min_size=1),
    st.integers(0, 31 * RECORD.itemsize),
    st.integers(0, 3 * RECORD.itemsize),
)
def test_of_a_write_that_was_cut_off_whole_records_are_kept_and_no_others(
    tmp_path: Path, written: dict[int, tuple[int, ...]], start: int, lost: int
) -> None:
    """A crash may lose any bytes of what was written, and leave zeros there."""
    path, rows = tmp_path / "counts", np.array(sorted(written), np.int64)
    path.unlink(missing_ok=True)
    measures = np.array([(1, *written[row]) for row in rows.tolist()], MEASURES)
    LengthCache(path, 31).write(rows, measures)
    whole = LengthCache(path, 31).read()
    assert whole[rows].tolist() == measures.tolist()
    assert int((whole["samples"] > 0).sum()) == len(rows)
    content = bytearray(path.read_bytes())
    harmed = {place // RECORD.itemsize for place in range(start, min(start + lost, len(content))) if content[place]}
    content[start : start + lost] = bytes(len(content[start : start + lost]))
    path.write_bytes(content)
    for row, found in enumerate(LengthCache(path, 31).read().tolist()):
        assert found == ((0,) * len(MEASURES) if row in harmed else whole[row].item())


def test_nothing_is_written_without_a_folder(opened: Open, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    measure(opened(), None)
    assert sorted(os.listdir(tmp_path)) == before
