"""Columns of tables: other names, turns in another shape, and what is wrong with them, said on opening."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.sources.table import AnnotationTable
from qwenvl.data.types import DatasetSpec
from qwenvl.utils.errors import UserError
from tests.data.sources.test_hf_datasets import FOLDERS, PICTURES, open_file, open_folder, sources, talk


@pytest.mark.parametrize("form", ["dataset", "parquet with pictures", "parquet", "jsonl", "json"])
def test_columns_have_other_names(tmp_path: Path, form: str) -> None:
    content = "pictures" if form in ("parquet", "jsonl", "json") else "bytes"
    records = [
        {"photo": {"bytes": PICTURES[n], "path": None} if content == "bytes" else f"{n}.png", "dialogue": talk(n),
         "image": "a caption", "uid": n}
        for n in range(2)
    ]  # fmt: skip
    columns = {"image": "photo", "conversations": "dialogue", "id": "uid"}
    if form == "dataset":
        Dataset.from_list(records).save_to_disk(tmp_path / "d")
        table = open_folder(tmp_path / "d", columns)
    elif form.startswith("parquet"):
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
        table = open_file(tmp_path / "a.parquet", columns)
    else:
        lines = ",\n".join(map(json.dumps, records))
        (tmp_path / f"a.{form}").write_text(f"[{lines}]" if form == "json" else lines.replace(",\n", "\n"))
        table = open_file(tmp_path / f"a.{form}", columns)
    assert [sources(samples)[0] for samples in table] == (PICTURES[:2] if content == "bytes" else ["0.png", "1.png"])
    assert [samples[0].origin.id for samples in table] == ["0", "1"]
    assert set(table[0][0].record) == {"image", "conversations", "id"}
    other = AnnotationTable(DatasetSpec("things", (), "", columns={"image": "image"}), table.files)
    assert other.fingerprint != table.fingerprint


def test_turns_that_are_stored_as_columns(tmp_path: Path) -> None:
    """``Sequence`` of a dictionary is a dictionary of lists, in Arrow."""
    turns = {"from": ["human", "gpt"], "value": ["?", "yes"]}
    Dataset.from_list([{"conversations": turns}]).save_to_disk(tmp_path / "d")
    (sample,) = open_folder(tmp_path / "d")[0]
    assert [message.text for message in build_conversation(sample, ()).messages] == ["?", "yes"]


def damage(folder: Path) -> None:
    FOLDERS["save_to_disk"](folder)
    arrow = next(folder.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:50])


def of_numbers(folder: Path) -> None:
    Dataset.from_list([{"image": 3, "conversations": "text", "turns": talk(0, 0)}]).save_to_disk(folder)


MISTAKES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], list[str]]] = {
    "split": (FOLDERS["splits"], {"split": "validation"}, ["no split 'validation'", "It has: test, train"]),
    "split of one": (FOLDERS["save_to_disk"], {"split": "test"}, ["no split 'test'", "It has: train"]),
    "split of files": (FOLDERS["parquet"], {"split": "test"}, ["no split 'test'", "It has: train"]),
    "config": (FOLDERS["save_to_disk"], {"config": "en"}, ["save_to_disk", "no 'config'"]),
    "config of files": (FOLDERS["parquet"], {"config": "en"}, ["'en' not found", "default"]),
    "column": (
        FOLDERS["parquet"],
        {"columns": {"images": "imag"}},
        ["no column 'imag'", "Did you mean 'image'", "Its columns: id, image, conversations"],
    ),
    "no turns": (
        FOLDERS["parquet"],
        {"columns": {"id": "conversations"}},
        ["no column 'conversations' or 'messages'", "Its columns: id, image, conversations", '"columns"'],
    ),
    "type of turns": (of_numbers, {"columns": {}}, ["'conversations' is of type string", "a list of turns"]),
    "type of images": (
        of_numbers,
        {"columns": {"conversations": "turns", "images": "image"}},
        ["'image' ('images') is of type int64", "paths, images or bytes"],
    ),
    "empty folder": (lambda folder: folder.mkdir(), {}, ["cannot be opened", "data files"]),
    "damaged": (damage, {}, ["cannot be opened"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_explained(tmp_path: Path, case: str) -> None:
    make, arguments, expected = MISTAKES[case]
    make(tmp_path / "d")
    with pytest.raises(UserError) as caught:
        open_folder(tmp_path / "d", **arguments)
    for words in ["'things'", str(tmp_path / "d"), *expected]:
        assert words in str(caught.value)


def test_columns_of_other_forms_are_turns(tmp_path: Path) -> None:
    """Also under other names, and with lists of structs stored as structs of lists."""
    turn = {"role": ["user"], "content": ["?"]}
    for columns, row in (
        ({}, {"query": "?", "response": "yes"}),
        ({"query": "question", "response": "answer"}, {"question": "?", "answer": "yes"}),
        ({}, {"prompt": turn, "completion": {"role": ["assistant"], "content": ["yes"]}}),
        ({}, {"prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "yes"}]}),
    ):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        (sample,) = open_file(tmp_path / "a.parquet", columns)[0]
        assert [message.text for message in build_conversation(sample, ()).messages] == ["?", "yes"]
    pq.write_table(pa.Table.from_pylist([{"question": "?", "answers": ["yes"]}]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match='Its columns: question, answers.*Write "conversations"'):
        open_file(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"query": "?", "label": ["yes"]}]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'query' goes with 'response', which is missing"):
        open_file(tmp_path / "a.parquet")
