"""Plans in their files: read as written, and refused for other data or settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.packing.lengths import measure_lengths
from qwenvl.data.packing.plan import (
    PackPlan,
    cached_plan_path,
    make_plan,
    planned_datasets,
    read_plan,
    used_datasets,
    write_plan,
)
from qwenvl.data.sample_stats import Measures
from qwenvl.utils.errors import UserError
from tests.data.counting import encoder_of, table_of, talk

LIMIT = 60
RECORDS = [talk("Q", "It. " * (number + 1)) for number in range(20)]
BAD = {"conversations": [{"from": "human", "value": "and?"}]}
REMAKE = "python tools/pack_data.py --anew"


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Callable[..., Path]) -> SampleEncoder:
    return encoder_of(tiny_checkpoint("qwen3_vl"), LIMIT)


def rows_of(
    encoder: SampleEncoder, folder: Path, records: Sequence[Any] = RECORDS, **changes: Any
) -> ConversationDataset:
    """Return rows of two datasets: ``first``, of the records, and ``second``, of which every other row is used."""
    used: list[int] = changes.pop("used", [0, 2, 4, 6])
    skip: bool = changes.pop("skip", True)
    tables = [table_of(records, folder, name="first"), table_of(RECORDS[5:15], folder, used, name="second")]
    return ConversationDataset(tables, replace(encoder, **changes), skip_bad_samples=skip)


@pytest.fixture
def rows(encoder: SampleEncoder, tmp_path: Path) -> ConversationDataset:
    """Rows of which one is bad."""
    return rows_of(encoder, tmp_path, [*RECORDS[:7], BAD, *RECORDS[7:]])


@pytest.fixture
def plan(rows: ConversationDataset, tmp_path: Path) -> PackPlan:
    """The plan of the rows, written to ``tmp_path/plan``."""
    made = make_plan(rows, measure_lengths(rows, workers=0), seed=3)
    write_plan(tmp_path / "plan", made, rows, np.arange(len(rows)) * 1.5, seed=3)
    return made


def test_a_plan_is_read_as_it_was_made(plan: PackPlan, rows: ConversationDataset, tmp_path: Path) -> None:
    read = read_plan(tmp_path / "plan", rows, REMAKE)
    assert len(read.packs) == len(plan.packs) > 5
    assert read.packs.samples.tolist() == plan.packs.samples.tolist()
    assert read.packs.borders.tolist() == plan.packs.borders.tolist()
    assert read.measures.tolist() == plan.measures.tolist()
    assert read.events == plan.events
    assert [event.kind for event in read.events] == ["bad"]
    assert sorted(read.packs.samples.tolist()) == [row for row in range(25) if row != 7]
    assert max(read.packs.add_up(read.measures["tokens"])) <= LIMIT


def test_the_file_says_what_each_row_is(plan: PackPlan, rows: ConversationDataset, tmp_path: Path) -> None:
    table = parquet.read_table(tmp_path / "plan")
    assert table.column_names == ["pack", "dataset", "row", "index", *Measures._fields, "cost"]
    lines = table.to_pylist()
    assert table.schema.field("pack").type == pa.int32()
    assert len(lines) == len(rows) == 25
    assert (lines[-1]["pack"], lines[-1]["index"], lines[-1]["tokens"]) == (None, 7, 0)  # it is left out
    assert [line["pack"] for line in lines[:-1]] == plan.packs.pack_of_samples().tolist()
    of_second = [line for line in lines if line["dataset"] == "second"]
    assert sorted((line["index"], line["row"]) for line in of_second) == [(21, 0), (22, 2), (23, 4), (24, 6)]
    assert all(line["cost"] == line["index"] * 1.5 for line in lines)
    assert all(line["tokens"] == plan.measures["tokens"][line["index"]] for line in lines)


def test_the_packs_depend_on_the_seed(rows: ConversationDataset) -> None:
    measured = measure_lengths(rows, workers=0)
    made = [make_plan(rows, measured, seed).packs.samples.tolist() for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "content": (
        {"records": [*RECORDS[:7], BAD, talk("Q", "Other"), *RECORDS[8:]]},
        ["the content of dataset 'first'"],
    ),
    "rows": (
        {"used": [0, 2, 4, 8]},
        ["which rows of dataset 'second' are used (4 rows, now 4: its percent, --eval_ratio, --data_seed)"],
    ),
    "fewer rows": (
        {"used": [0, 2]},
        ["which rows of dataset 'second' are used (4 rows, now 2: its percent, --eval_ratio, --data_seed)"],
    ),
    "limit": ({"max_length": 59}, ["--model_max_length (60, now 59)"]),
    "policy": ({"overlength": "error"}, ["--overlength (drop, now error)"]),
    "encoder": (
        {"allow_remote": True},
        ["how samples are rendered and sized (processor, chat template, limits of images and videos, decoder)"],
    ),
    "two": (
        {"max_length": 59, "records": RECORDS},
        ["--model_max_length (60, now 59)", "the content of dataset 'first'"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.usefixtures("plan")
def test_other_data_or_settings_are_said(case: str, encoder: SampleEncoder, tmp_path: Path) -> None:
    changes, differences = CHANGES[case]
    others = rows_of(encoder, tmp_path, **{"records": [*RECORDS[:7], BAD, *RECORDS[7:]], **changes})
    with pytest.raises(UserError) as caught:
        read_plan(tmp_path / "plan", others, REMAKE)
    assert f"What differs: {'; '.join(differences)}. Train" in str(caught.value)
    assert str(caught.value).endswith(f"\n  {REMAKE}")


@pytest.mark.usefixtures("plan")
def test_other_datasets_are_said(rows: ConversationDataset, tmp_path: Path) -> None:
    others = ConversationDataset(rows.tables[::-1], rows.encoder, skip_bad_samples=True)
    with pytest.raises(UserError, match=r"the datasets \(first, second; now second, first\)"):
        read_plan(tmp_path / "plan", others, REMAKE)


@pytest.mark.usefixtures("plan")
def test_a_run_that_stops_at_bad_samples_refuses_a_plan_that_leaves_some_out(
    encoder: SampleEncoder, tmp_path: Path
) -> None:
    strict = rows_of(encoder, tmp_path, [*RECORDS[:7], BAD, *RECORDS[7:]], skip=False)
    with pytest.raises(UserError, match=r"leaves out 1 samples .*The first: .*rows\.jsonl:8: "):
        read_plan(tmp_path / "plan", strict, REMAKE)


def test_the_place_in_the_cache_depends_on_data_settings_and_seed(encoder: SampleEncoder, tmp_path: Path) -> None:
    places = [
        cached_plan_path(tmp_path, rows_of(encoder, tmp_path, **changes), seed)
        for changes, seed in (({}, 0), ({}, 0), ({}, 1), ({"used": [0, 2, 4, 8]}, 0), ({"max_length": 59}, 0))
    ]
    assert places[0] == places[1]
    assert len(set(places)) == 4
    assert places[0].parent == tmp_path / "plans"


def test_datasets_are_named_as_the_flag_names_them(encoder: SampleEncoder, tmp_path: Path) -> None:
    tables = [
        table_of(RECORDS, tmp_path, name=name, percent=percent) for name, percent in (("first", 100), ("second", 33.3))
    ]
    rows = ConversationDataset(tables, encoder)
    assert used_datasets(rows) == "first,second%33.3"
    write_plan(tmp_path / "plan", make_plan(rows, measure_lengths(rows, workers=0), 0), rows, np.zeros(len(rows)), 0)
    assert planned_datasets(tmp_path / "plan") == "first,second%33.3"


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = parquet.read_table(path)
    changed = change(table)
    parquet.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


def with_column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        values = pa.array(change(table[name].to_numpy().copy()))
        return table.set_column(table.column_names.index(name), name, values)

    return changed


@pytest.mark.parametrize(
    "change",
    [
        with_column("index", lambda index: np.roll(index, 1)),  # each is there, at another row of a dataset
        with_column("row", lambda row: row + 1),
        with_column("index", lambda index: np.where(index == 3, 4, index)),  # one is missing, one there twice
        lambda table: table.slice(1),
        lambda table: pa.concat_tables([table, table.slice(0, 1)]),
    ],
    ids=["other order", "other rows", "twice", "fewer", "more"],
)
@pytest.mark.usefixtures("plan")
def test_a_damaged_file_is_refused(
    change: Callable[[pa.Table], pa.Table], rows: ConversationDataset, tmp_path: Path
) -> None:
    rewrite(tmp_path / "plan", change)
    with pytest.raises(UserError, match="is damaged: its rows are not the rows that it was made for"):
        read_plan(tmp_path / "plan", rows, REMAKE)


@pytest.mark.usefixtures("plan")
def test_packs_beyond_the_limit_are_refused(rows: ConversationDataset, tmp_path: Path) -> None:
    rewrite(tmp_path / "plan", with_column("tokens", lambda tokens: tokens + 50 * (np.arange(len(tokens)) == 2)))
    with pytest.raises(UserError, match=f"packs longer than --model_max_length. Make it again:\n  {REMAKE}"):
        read_plan(tmp_path / "plan", rows, REMAKE)


def test_what_is_no_plan_is_refused(rows: ConversationDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_plan(tmp_path / "none", rows, REMAKE)
    (tmp_path / "text").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(tmp_path / "text", rows, REMAKE)
    parquet.write_table(pa.table({"pack": [0]}), tmp_path / "table")
    for metadata in ({}, {b"qwenvl_plan": b'{"made_for": {"version": 0}}'}):
        rewrite(tmp_path / "table", lambda table, metadata=metadata: table)
        table = parquet.read_table(tmp_path / "table").replace_schema_metadata(metadata)
        parquet.write_table(table, tmp_path / "table")
        with pytest.raises(UserError, match="not a plan that this version reads"):
            planned_datasets(tmp_path / "table")


def test_a_plan_that_cannot_be_written_is_said(plan: PackPlan, rows: ConversationDataset, tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="the plan .*folder cannot be written: "):
        write_plan(tmp_path / "folder", plan, rows, np.zeros(len(rows)), seed=0)
