"""Read annotation files as a table of samples: opened quickly, parsed row by row, cheap to send to workers.

=================  ==========================================================================
``.json``          one JSON array of samples
``.jsonl``         one sample per line; ``.ndjson`` too. Blank lines are skipped
``.parquet``       one sample per row
``.gz`` after it   the same, compressed (not Parquet); decompressed into memory once per process
=================  ==========================================================================

Parquet with a column of bytes holds images, and is opened by the ``datasets`` library, like a Hugging Face dataset.

With any other suffix the first character decides: ``[`` an array, ``{`` lines, ``PAR1`` Parquet. Text is UTF-8, with
or without a byte order mark. A row that is a list of samples is a packed row of the official recipe.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwenvl.data.sources.hf_datasets import open_dataset, open_parquet
from qwenvl.data.sources.json.rows import JsonRows
from qwenvl.data.sources.parquet import PARQUET_MAGIC, ParquetRows
from qwenvl.data.sources.schema import check_columns, holds_bytes, to_fields
from qwenvl.data.sources.text_file import TextFile
from qwenvl.data.types import TRAINING_OPTIONS, DatasetSpec, Sample
from qwenvl.utils.cache import fingerprint
from qwenvl.utils.errors import Origin, SampleError, UserError

if TYPE_CHECKING:
    import pyarrow

LINE_SUFFIXES = (".jsonl", ".ndjson")
_HEAD = 4096  # bytes
_COCO = "It looks like COCO, which has boxes and no questions: tools/process_bbox.ipynb makes samples of them."
_LIST = "It looks like a list of datasets: name each annotation file in the registry (data/__init__.py), "
_OTHER_FILES = (
    ((b'"categories"',), _COCO),
    ((b'"images"', b'"file_name"'), _COCO),
    ((b'"root"', b'"annotation"'), f"{_LIST}with its 'root' as data_path."),  # of InternVL
    ((b'"formatting"', b'"file_name"'), f"{_LIST}with its folder as data_path."),  # of LLaMA-Factory
)
"""Advice for a .json file that is one object, by words at its start."""
_LIST_OF_SAMPLES = re.compile(rb'[^{]*\{\s*"([^"\\]{1,40})"\s*:\s*\[\s*\{')
_TURNS = ("conversations", "messages")  # keys of one sample whose value is a list of objects too


class Rows(Protocol):
    """The rows of one annotation file."""

    path: str

    @property
    def schema(self) -> pyarrow.Schema | None:
        """Type of all rows; None where each row has its own."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the file's content: equal for equal rows, different once the file has changed."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def line(self, row: int) -> int:
        """Return the place of a row in its file, counted from 1: its line in JSON Lines, its item elsewhere."""
        ...

    def record(self, row: int) -> Any:
        """Parse a row.

        Raises:
            SampleError: the row cannot be parsed; without the origin.
        """
        ...

    def text(self, row: int) -> bytes | None:
        """Return the JSON of a row as it is in the file; None where there is none."""
        ...


class AnnotationTable:
    """The rows of a dataset's annotation files, one after the other.

    Args:
        spec: Registry entry of the dataset.
        files: Opened files, in order; or the one Hugging Face dataset.
    """

    def __init__(self, spec: DatasetSpec, files: tuple[Rows, ...]) -> None:
        self.spec = spec
        self.files = files
        self._ends = tuple(accumulate(len(rows) for rows in files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> tuple[Sample, ...]:
        """Parse a row: one sample, or the samples of a packed row.

        Raises:
            SampleError: the row is not JSON (``bad_json``), or not an object or a list of objects (``bad_record``).
            UserError: the system cannot read the file any more.
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a table of {len(self)}")
        rows, place = self._locate(row)
        origin = Origin(self.spec.name, rows.path, rows.line(place))
        try:
            return self._to_samples(rows.record(place), origin)
        except SampleError as error:
            raise error.at(origin) from error.__cause__
        except OSError as error:
            reason = str(error) if error.errno is None else os.strerror(error.errno)
            raise UserError(
                f"{origin}: the annotation file cannot be read any more ({reason}). Check its disk or network, then "
                "start again."
            ) from error

    def __iter__(self) -> Iterator[tuple[Sample, ...]]:
        return (self[row] for row in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Hash of the content of all files, in order, and of the renamed columns."""
        columns = [dict(self.spec.columns)] if self.spec.columns else []
        return fingerprint(*(rows.fingerprint for rows in self.files), *columns)

    def origin(self, row: int) -> Origin:
        """Return the origin of a row, without parsing it."""
        rows, place = self._locate(row)
        return Origin(self.spec.name, rows.path, rows.line(place))

    def text(self, row: int) -> bytes | None:
        """Return the JSON of a row as it is in its file, parsable or not; None where the file is not text."""
        rows, place = self._locate(row)
        return rows.text(place)

    def _locate(self, row: int) -> tuple[Rows, int]:
        number = bisect_right(self._ends, row)
        return self.files[number], row - (self._ends[number - 1] if number else 0)

    def _to_samples(self, value: Any, origin: Origin) -> tuple[Sample, ...]:
        if not isinstance(value, list):
            return (self._to_sample(value, origin, None),)
        if not value:
            raise SampleError("bad_record", "the row is an empty list; a packed row must hold samples.")
        return tuple(self._to_sample(record, origin, member) for member, record in enumerate(value, start=1))

    def _to_sample(self, record: Any, origin: Origin, member: int | None) -> Sample:
        if isinstance(record, dict):
            record = to_fields(record, self.spec.columns)
        place = Origin(origin.dataset, origin.file, origin.line, _sample_id(record), member)
        if not isinstance(record, dict):
            raise SampleError(
                "bad_record",
                f'a sample must be a JSON object such as {{"conversations": [...]}}, not {_kind(record)}.',
                place,
            )
        options = self.spec.options
        return Sample(
            place,
            record,
            self.spec.data_path,
            bool(options.get("allow_absolute")),
            options.get("bbox_format"),
            {key: options[key] for key in TRAINING_OPTIONS if key in options},
        )


def open_annotations(spec: DatasetSpec, cache_dir: str | None = None, check_ends: bool = True) -> AnnotationTable:
    """Open a dataset's annotation files or Hugging Face dataset.

    Rows are counted, the first and last of each JSON file are parsed, and the columns of tables are checked.

    Args:
        spec: Registry entry of the dataset.
        cache_dir: Folder for the indexes of its files; None for the default one.
        check_ends: Whether to refuse a file whose first or last row cannot be parsed, usually a file of another kind.

    Raises:
        UserError: a file is missing, empty, of another format than its name says, or broken; columns are missing or of
            another type; or there is no row.
    """
    table = AnnotationTable(spec, tuple(_open_rows(spec, cache_dir, check_ends)))
    if not len(table):
        files = ", ".join(rows.path for rows in table.files)
        raise UserError(f"Dataset {spec.name!r} has no rows: {files}. Take it out of --dataset_use, or fill it.")
    for rows in table.files:
        if rows.schema is not None:
            try:
                check_columns(rows.schema, spec.columns)
            except UserError as error:
                raise UserError(f"Dataset {spec.name!r}: {rows.path}: {error}") from error
    return table


def _open_rows(spec: DatasetSpec, cache_dir: str | None, check_ends: bool) -> Iterator[Rows]:
    if spec.hf_dataset is not None:
        try:
            yield open_dataset(spec.hf_dataset)
        except UserError as error:
            raise UserError(f"Dataset {spec.name!r}: {error}") from error
    for path in spec.annotation_paths:
        yield _open_file(path, spec.name, cache_dir, check_ends)


def _open_file(path: str, dataset: str, cache_dir: str | None, check_ends: bool) -> Rows:
    where = f"Dataset {dataset!r}: annotation file {path}"
    try:
        return _choose_reader(path, cache_dir, check_ends)
    except FileNotFoundError as error:
        raise UserError(f"{where} does not exist. Correct its registry entry.") from error
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _choose_reader(path: str, cache_dir: str | None, check_ends: bool) -> Rows:
    with open(path, "rb") as file:
        magic = file.read(4)
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    suffix = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if magic == PARQUET_MAGIC or suffix == ".parquet":
        rows = ParquetRows(path)
        return open_parquet(path, rows.fingerprint) if holds_bytes(rows.schema) else rows
    text = TextFile(path, compressed=magic[:2] == b"\x1f\x8b")
    if suffix in LINE_SUFFIXES:
        return JsonRows(text, "lines", cache_dir, check_ends)
    first = text.first_character()
    if not first:
        raise UserError("is empty. Fill it, or take it out of the registry entry.")
    if suffix == ".json" and first != "[":
        raise UserError(
            f"a .json file must hold one array of samples, [...], and this one starts with {first!r}. "
            f"{_advice(text.read(0, _HEAD))}"
        )
    if first == "[":
        return JsonRows(text, "array", cache_dir, check_ends)
    if first == "{":
        return JsonRows(text, "lines", cache_dir, check_ends)
    raise UserError(
        f"is neither JSON, JSON Lines nor Parquet: it starts with {first!r}. Name it .json, .jsonl or .parquet, "
        "and .gz after that where it is compressed."
    )


def _advice(head: bytes) -> str:
    """Return advice for a .json file that is one object, by its first bytes."""
    for words, advice in _OTHER_FILES:
        if all(word in head for word in words):
            return advice
    if (listed := _LIST_OF_SAMPLES.match(head)) and (key := listed[1].decode(errors="replace")) not in _TURNS:
        return f"Its samples seem to be the list under {key!r}: save that list alone."
    return "If each of its lines is a sample, name it .jsonl; if it is one sample, put [ ] around it."


def _sample_id(record: Any) -> str | None:
    identifier = record.get("id") if isinstance(record, dict) else None
    return str(identifier) if isinstance(identifier, str | int) else None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
