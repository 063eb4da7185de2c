"""The same samples in JSON, JSON Lines, Parquet and a saved dataset are the same tokens and labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwenvl.data.dataset import ConversationDataset, SampledTable
from qwenvl.data.sources.nulls import as_written
from qwenvl.data.sources.table import AnnotationTable, open_annotations
from qwenvl.data.types import DatasetSpec, HuggingFaceDataset
from tests.data.counting import encoder_of


def asked(name: str, argument: str, value: Any, **turn: Any) -> dict[str, Any]:
    """A sample in which one of several functions is called, each with an argument of its own."""
    properties = {argument: {"type": "string", "enum": ["Rome", "CET"]}}
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    call = {"type": "function", "function": {"name": name, "arguments": {argument: value}}}
    turns = [
        {"role": "user", "content": f"<image>What about {argument}?"},
        {"role": "assistant", "content": "", "tool_calls": [call], **turn},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Twelve."},
    ]
    return {"id": name, "images": ["a.png"], "messages": turns, "tools": [tool]}


SAMPLES = [
    asked("weather", "city", "Rome"),
    asked("time", "zone", "CET", reasoning_content="Hm."),
    asked("walk", "steps", [{"north": 1}, {"south": 2, "why": "x"}], loss=False),
    {"id": "plain", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
]


def written(form: str, samples: list[dict[str, Any]], folder: Path) -> AnnotationTable:
    """Write samples in one of the forms, and open them."""
    path = folder / f"rows.{form}"
    if form == "json":
        path.write_text(json.dumps(samples))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(samples), path)
    else:
        datasets.Dataset.from_list(samples).save_to_disk(str(path))
        return open_annotations(DatasetSpec("d", (), str(folder), hf_dataset=HuggingFaceDataset(str(path))))
    return open_annotations(DatasetSpec("d", (str(path),), str(folder)))


def trained(table: AnnotationTable, checkpoint: Path) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of every row."""
    dataset = ConversationDataset([SampledTable(table, np.arange(len(table)))], encoder_of(checkpoint))
    items = [dataset[index] for index in range(len(dataset))]
    assert [item.error for item in items] == [None] * len(items)
    return [(item.samples[0].tokens.input_ids.tolist(), item.samples[0].tokens.labels.tolist()) for item in items]


@pytest.mark.parametrize(("family", "template"), [("qwen3_vl", "thinking"), ("qwen3_5", None)])
def test_the_same_samples_are_the_same_tokens(
    family: str, template: str | None, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    checkpoint = tiny_checkpoint(family, template)
    expected = trained(written("json", SAMPLES, tmp_path), checkpoint)
    for form in ("jsonl", "parquet", "saved"):
        assert trained(written(form, SAMPLES, tmp_path), checkpoint) == expected, form
    texts = [{**sample, "tools": json.dumps(sample["tools"]) if "tools" in sample else None} for sample in SAMPLES]
    assert trained(written("parquet", texts, tmp_path), checkpoint) == expected


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_rows_are_what_their_author_wrote(form: str, tmp_path: Path) -> None:
    table = written(form, SAMPLES, tmp_path)
    for row, sample in enumerate(SAMPLES):
        record = table[row][0].record
        assert {name: value for name, value in record.items() if value is not None} == sample


def test_null_in_json_is_a_value(tmp_path: Path) -> None:
    """Its author wrote it; so is a null inside a JSON string of a table."""
    sample = asked("weather", "city", None)
    for form in ("json", "jsonl"):
        assert written(form, [sample], tmp_path)[0][0].record == sample
    sample["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": null}'
    record = written("parquet", [sample], tmp_path)[0][0].record
    assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": null}'


def test_maps_are_objects_and_nulls_of_lists_and_maps_stay(tmp_path: Path) -> None:
    arguments = pa.map_(pa.string(), pa.struct([("a", pa.int64()), ("b", pa.list_(pa.int64()))]))
    call = pa.struct([("name", pa.string()), ("arguments", arguments)])
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    calls = [{"name": "f", "arguments": [("x", {"a": 1}), ("y", None), ("z", {"b": [None, 2]})]}]
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": calls}]
    pq.write_table(pa.table({"messages": pa.array([turns], pa.list_(turn))}), tmp_path / "a.parquet")
    record = open_annotations(DatasetSpec("d", (str(tmp_path / "a.parquet"),), ""))[0][0].record
    wanted = [{"name": "f", "arguments": {"x": {"a": 1}, "y": None, "z": {"b": [None, 2]}}}]
    assert record == {"messages": [turns[0], {**turns[1], "tool_calls": wanted}]}


def test_nulls_of_whole_columns_stay_and_structs_of_nulls_are_empty() -> None:
    schema = pa.schema([("image", pa.string()), ("a", pa.struct([("b", pa.struct([("c", pa.int64())]))]))])
    row = {"image": None, "a": {"b": {"c": None}}}
    assert as_written(row, schema) == {"image": None, "a": {"b": {}}}
    assert as_written({"image": None, "a": None}, schema) == {"image": None, "a": None}
