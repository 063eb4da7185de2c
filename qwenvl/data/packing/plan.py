"""Make packing plans, the rows of each pack, once from exact lengths, and keep them in Parquet files.

A file has one line per row of the run, pack after pack; rows that are left out come last, without a pack. Columns:
``pack``, ``dataset`` (registry name), ``row`` (place in the dataset's annotations, from 0), ``index`` (place among the
rows of the run), the statistics of :mod:`qwenvl.data.sample_stats`, and ``cost`` (floating point operations). The
file's metadata describe the data and settings that it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl.data.bin_packing import Packs, pack
from qwenvl.data.dataset import ConversationDataset, SampledTable
from qwenvl.data.encoding.encoded import Event
from qwenvl.data.packing.lengths import RowLengths
from qwenvl.data.sample_stats import MEASURES, Measures
from qwenvl.utils.cache import array_hash, fingerprint, replacing
from qwenvl.utils.errors import UserError

_VERSION = 4
_METADATA_KEY = b"qwenvl_plan"
_MEANING = {
    "model_max_length": "--model_max_length",
    "overlength": "--overlength",
    "encoder": "how samples are rendered and sized (processor, chat template, limits of images and videos, decoder)",
}


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Rows in packs.

    Args:
        packs: Packs of the indices of a dataset's rows.
        measures: :data:`~qwenvl.data.sample_stats.MEASURES` [rows]; all zeros for a row that is left out.
        events: Events to report of the rows.
    """

    packs: Packs
    measures: np.ndarray
    events: tuple[Event, ...]


def make_plan(rows: ConversationDataset, lengths: RowLengths, seed: int) -> PackPlan:
    """Put rows into packs; the result is the same on every rank and in every run.

    Args:
        rows: Dataset without packs.
        lengths: Lengths of its rows.
        seed: Seed of :func:`qwenvl.data.bin_packing.pack`.
    """
    usable = np.flatnonzero(lengths.measures["tokens"])
    tokens, patches = (lengths.measures[name][usable] for name in ("tokens", "patches"))
    packs = pack(tokens, rows.encoder.max_length, seed, patches)
    return PackPlan(replace(packs, samples=usable[packs.samples]), lengths.measures, lengths.events)


def describe_rows(rows: ConversationDataset) -> dict[str, Any]:
    """Return the data and settings that a plan of these rows depends on, for JSON; reads the annotation files once."""
    return {
        "version": _VERSION,
        "model_max_length": rows.encoder.max_length,
        "overlength": rows.encoder.overlength,
        "encoder": rows.encoder.fingerprint(),
        "datasets": {table.table.spec.name: _describe_table(table) for table in rows.tables},
    }


def _describe_table(table: SampledTable) -> dict[str, Any]:
    spec = table.table.spec
    rows = array_hash(table.rows)
    return {
        "percent": spec.sampling_percent,
        "content": table.table.fingerprint,
        "rows": rows,
        "count": len(table.rows),
    }


def cached_plan_path(cache: Path, rows: ConversationDataset, seed: int) -> Path:
    """Return where the plan of these rows is kept."""
    return cache / "plans" / f"{fingerprint(describe_rows(rows), seed)}.parquet"


def write_plan(path: Path, plan: PackPlan, rows: ConversationDataset, costs: np.ndarray, seed: int) -> None:
    """Write a plan.

    Args:
        path: File to write, replaced in one step.
        plan: Plan of these rows.
        rows: Dataset without packs.
        costs: float64 [rows], training cost of each row.
        seed: Seed of the plan, for information.

    Raises:
        UserError: the file cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    left_out = np.flatnonzero(plan.measures["tokens"] == 0)
    order = np.concatenate([plan.packs.samples, left_out])
    packs = np.concatenate([plan.packs.pack_of_samples(), np.zeros(len(left_out), np.int64)])
    tables, places = rows.locate_all()
    names = pa.array([table.table.spec.name for table in rows.tables])
    columns = {
        "pack": pa.array(packs.astype(np.int32), mask=np.arange(len(order)) >= len(plan.packs.samples)),
        "dataset": pa.DictionaryArray.from_arrays(pa.array(tables[order].astype(np.int32)), names),
        "row": places[order],
        "index": order,
        **{name: plan.measures[name][order] for name in Measures._fields},
        "cost": costs[order],
    }
    metadata = {"made_for": describe_rows(rows), "seed": seed, "events": [asdict(event) for event in plan.events]}
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata)})
    try:
        with replacing(path) as temporary:
            parquet.write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise UserError(f"the plan {path} cannot be written: {error.strerror or error}.") from error


def planned_datasets(path: Path) -> str:
    """Return the datasets of a plan as ``--dataset_use`` names them.

    Raises:
        UserError: the file is not a plan.
    """
    datasets = _read_metadata(path)["made_for"]["datasets"]
    return _as_flag({name: described["percent"] for name, described in datasets.items()})


def used_datasets(rows: ConversationDataset) -> str:
    """Return the datasets of some rows as ``--dataset_use`` names them."""
    return _as_flag({table.table.spec.name: table.table.spec.sampling_percent for table in rows.tables})


def _as_flag(percents: Mapping[str, float]) -> str:
    return ",".join(name if percent == 100 else f"{name}%{percent:.15g}" for name, percent in percents.items())


def read_plan(path: Path, rows: ConversationDataset, remake: str) -> PackPlan:
    """Read the plan of some rows.

    Args:
        path: File of :func:`write_plan`.
        rows: Dataset without packs.
        remake: Command that makes the plan again, for the message.

    Raises:
        UserError: the file is not a plan, belongs to other rows or settings, or leaves out bad samples that must stop
            this run.
    """
    metadata = _read_metadata(path)
    differences = _differences(metadata["made_for"], describe_rows(rows))
    if differences:
        raise UserError(
            f"The plan {path} was made for other data or settings. What differs: {'; '.join(differences)}. Train with "
            f"the plan's own, or make it again:\n  {remake}"
        )
    events = tuple(Event(**event) for event in metadata["events"])
    bad = [event for event in events if event.kind == "bad"]
    if bad and not rows.skips_bad_samples:
        raise UserError(
            f"The plan {path} leaves out {len(bad)} samples that cannot be used, and --on_bad_sample raise stops at "
            f"them. Correct them and make the plan again, or pass --on_bad_sample skip. The first: {bad[0].message}"
        )
    packs, measures = _read_rows(path, rows)
    if len(packs) and int(packs.add_up(measures["tokens"]).max()) > rows.encoder.max_length:
        raise UserError(f"The plan {path} holds packs longer than --model_max_length. Make it again:\n  {remake}")
    return PackPlan(packs, measures, events)


def _read_metadata(path: Path) -> dict[str, Any]:
    from pyarrow import ArrowException, parquet

    try:
        content = (parquet.read_schema(path).metadata or {}).get(_METADATA_KEY)
    except FileNotFoundError as error:
        raise UserError(f"The plan {path} does not exist. Make it with tools/pack_data.py.") from error
    except (OSError, ArrowException) as error:
        raise UserError(f"The plan {path} cannot be read: {error}. Make it with tools/pack_data.py.") from error
    metadata: dict[str, Any] = {} if content is None else json.loads(content)
    if metadata.get("made_for", {}).get("version") != _VERSION:
        raise UserError(
            f"{path} is not a plan that this version reads. Make one: tools/pack_data.py --format plan. (An official "
            "packed file is registered as a dataset, and used with --data_packing True.)"
        )
    return metadata


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences in data and settings in words; empty where there are none."""
    found = [
        meaning if name == "encoder" else f"{meaning} ({saved[name]}, now {now[name]})"
        for name, meaning in _MEANING.items()
        if saved[name] != now[name]
    ]
    if list(saved["datasets"]) != list(now["datasets"]):
        return [*found, f"the datasets ({', '.join(saved['datasets'])}; now {', '.join(now['datasets'])})"]
    for name, described in now["datasets"].items():
        before = saved["datasets"][name]
        if before["content"] != described["content"]:
            found.append(f"the content of dataset {name!r}")
        elif before["rows"] != described["rows"]:
            counts = f"{before['count']} rows, now {described['count']}"
            found.append(f"which rows of dataset {name!r} are used ({counts}: its percent, --eval_ratio, --data_seed)")
    return found


def _read_rows(path: Path, rows: ConversationDataset) -> tuple[Packs, np.ndarray]:
    """Return packs and measures by the indices of ``rows``."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    index, codes = table["index"].to_numpy(), table["dataset"].combine_chunks()
    names = [one.table.spec.name for one in rows.tables]
    numbers = np.array([names.index(name) for name in codes.dictionary.to_pylist()])
    tables, places = rows.locate_all()
    each_once = len(index) == len(rows) and np.array_equal(np.sort(index), np.arange(len(rows)))
    if not (
        each_once
        and np.array_equal(numbers[codes.indices.to_numpy()], tables[index])
        and np.array_equal(table["row"].to_numpy(), places[index])
    ):
        raise UserError(f"The plan {path} is damaged: its rows are not the rows that it was made for. Make it again.")
    measures = np.zeros(len(rows), MEASURES)
    for name in Measures._fields:
        measures[name][index] = table[name].to_numpy()
    packs = table["pack"].drop_null().to_numpy()  # they come first
    borders = np.concatenate([[0], np.cumsum(np.bincount(packs))]).astype(np.int64)
    return Packs(index[: len(packs)], borders), measures
