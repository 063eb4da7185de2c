"""Rows that are trained and evaluated on are found file by file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest

from qwenvl.data.dataset import SampledTable
from qwenvl.data.overlap import shared_rows
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec, HuggingFaceDataset

ROW = '{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("a", 5), ("b", 3), ("c", 2)):
        (tmp_path / f"{name}.jsonl").write_text(ROW * rows)
    return tmp_path


def table(folder: Path, names: str, rows: Sequence[int] | None = None, name: str = "") -> SampledTable:
    """Return the rows of some files, one a letter, one after the other."""
    spec = DatasetSpec(name or names, tuple(str(folder / f"{letter}.jsonl") for letter in names), "")
    opened = open_annotations(spec)
    return SampledTable(opened, np.arange(len(opened)) if rows is None else np.array(rows))


def test_a_file_that_both_sides_read_is_found(folder: Path) -> None:
    assert shared_rows([table(folder, "ab")], [table(folder, "a")]) == {"a": 5}
    assert shared_rows([table(folder, "a")], [table(folder, "ba")]) == {"ba": 5}
    assert shared_rows([table(folder, "a"), table(folder, "b")], [table(folder, "ab"), table(folder, "c")]) == {"ab": 8}
    assert shared_rows([table(folder, "ab")], [table(folder, "c")]) == {}


def test_only_rows_that_both_sides_use_count(folder: Path) -> None:
    train = table(folder, "cab", [0, 2, 3, 3, 7])  # a: 0, 1; b: 0
    assert shared_rows([train], [table(folder, "a", [0, 0, 4])]) == {"a": 1}
    assert shared_rows([train], [table(folder, "ba", [0, 1, 2, 4])]) == {"ba": 2}
    assert shared_rows([train], [table(folder, "b", [1, 2])]) == {}


def test_another_name_of_a_file_is_the_same_file(folder: Path) -> None:
    os.symlink(folder / "a.jsonl", folder / "d.jsonl")
    assert shared_rows([table(folder, "a", name="x")], [table(folder, "d", name="y")]) == {"y": 5}


def test_hugging_face_datasets_are_told_apart_by_their_splits(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}] * 4
    split = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    train, test = (
        SampledTable(
            open_annotations(DatasetSpec(name, (), "", hf_dataset=HuggingFaceDataset(str(tmp_path / "saved"), name))),
            np.arange(4),
        )
        for name in ("train", "test")
    )
    assert shared_rows([train], [test]) == {}
    assert shared_rows([train], [train]) == {"train": 4}
