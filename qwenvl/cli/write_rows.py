"""Write the rows of a dataset without some samples, and change nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwenvl.data.sources.table import AnnotationTable
from qwenvl.utils.errors import SampleError


def write_rows(table: AnnotationTable, left_out: Mapping[int, Collection[int]], path: Path) -> int:
    """Write the rows of a dataset as JSON lines, without some of its samples; return the number of rows.

    JSON lines are copied byte for byte. Other rows are serialized again with all of their fields: items of an indented
    array, rows of Parquet files, packed rows without some members. Bytes, which JSON cannot hold, become data URIs.

    Args:
        table: Annotations of the dataset.
        left_out: Members of rows that are left out, from 0; 0 for the sample of an ordinary row.
        path: File to write.
    """
    rows = 0
    with path.open("wb") as file:
        for row in range(len(table)):
            text = _kept(table, row, left_out[row]) if row in left_out else table.text(row)
            if text == b"":
                continue
            if text is None or b"\n" in text or b"\r" in text:
                text = _kept(table, row, ())
            file.write(text + b"\n")
            rows += 1
    return rows


def _kept(table: AnnotationTable, row: int, left_out: Collection[int]) -> bytes:
    """Return a row without some members; empty if none is left, or if it cannot be read."""
    try:
        samples = table[row]
    except SampleError:
        return b""
    records = [_as_json(sample.record) for member, sample in enumerate(samples) if member not in left_out]
    packed = samples[0].origin.member is not None
    return dump(records if packed else records[0]).encode() if records else b""


def dump(value: Any) -> str:
    """Return a value as a line of JSON that UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False)
    # Half of a surrogate pair cannot be written as UTF-8; escaped, it can.
    return text if text.isascii() or not any("\ud800" <= one <= "\udfff" for one in text) else json.dumps(value)


def _as_json(value: Any) -> Any:
    """Return a value in a form that JSON can hold: embedded media as data URIs, other objects as text."""
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            rest = {key: item for key, item in value.items() if key not in ("bytes", "path")}
            return _as_json(rest) | {"url": _data_uri(value["bytes"])}
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, bytes):
        return _data_uri(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _data_uri(content: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"
