"""Read rows of a Parquet annotation file by row groups."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from qwenvl.data.sources.nulls import as_written
from qwenvl.utils.cache import fingerprint
from qwenvl.utils.errors import SampleError, UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

PARQUET_MAGIC = b"PAR1"
CACHED_BYTES = 256 << 20

GROUP_BYTES = 4 << 30
"""Most bytes of a row group in memory, as computed from the file's metadata."""

ROW_BYTES = 256 << 20
"""Most bytes of a row in memory: a few bytes of a file can repeat a long text any number of times."""

_VALUE_BYTES = 64  # about the size of a Python object


class ParquetRows:
    """The rows of a Parquet file.

    Row groups stay in memory once read; the least recently used are dropped when they exceed :data:`CACHED_BYTES`
    together, in each process. A file of many large row groups is slow in random order; JSON Lines has no such limit. A
    text that a group contains many times is in memory once, as in the file.

    Args:
        path: Parquet file.

    Raises:
        UserError: it is not a Parquet file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: pyarrow.parquet.ParquetFile | None = None
        self._process = -1  # id of the process that opened the file: a forked worker opens it again
        self._groups: OrderedDict[int, tuple[pyarrow.Table, np.ndarray]] = OrderedDict()
        self._texts: list[str] = []
        with _damage_explained():
            self.schema: pyarrow.Schema = self._open().schema_arrow
            metadata = self._open().metadata
            self._texts, self._file = _text_columns(metadata.schema), None  # opened again, texts as dictionaries
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if any(number < 0 for number in rows):
            raise UserError("is not a whole Parquet file (it counts fewer than no rows). Make or copy it again.")
        self._ends = list(accumulate(rows))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_groups": OrderedDict()}

    @property
    def fingerprint(self) -> str:
        """Hash of the footer (schema, sizes and statistics of every column), the file's size and its modification time.

        Such a file can hold images: reading all of it would take too long.
        """
        status = os.stat(self.path)
        with _damage_explained():
            footer = repr(self._open().metadata.to_dict())
        return fingerprint(footer, status.st_size, status.st_mtime_ns)

    def line(self, row: int) -> int:
        """Return the place of a row in the table, counted from 1."""
        return row + 1

    def record(self, row: int) -> dict[str, Any]:
        """Read a row; see :class:`qwenvl.data.sources.table.Rows`."""
        group = bisect_right(self._ends, row)
        start = self._ends[group - 1] if group else 0
        try:
            with _damage_explained():
                table, sizes = self._group(group)
                if sizes[row - start] > ROW_BYTES:
                    mebibytes = f"{sizes[row - start] / 2**20:.0f} MiB"
                    raise SampleError(
                        "decompression_bomb",
                        f"the row takes {mebibytes} of memory; the limit is {ROW_BYTES >> 20} MiB.",
                    )
                record = as_written(table.slice(row - start, 1).to_pylist()[0], table.schema)
        except SampleError:
            raise
        except UserError as error:
            raise SampleError("unreadable_file", f"{self.path} {error}") from error.__cause__
        return record

    def text(self, row: int) -> None:
        """Return None: the rows of a table have no text."""

    def _group(self, group: int) -> tuple[pyarrow.Table, np.ndarray]:
        """Return the rows of a group, and the size of each in bytes: int64 [rows]."""
        if group not in self._groups:
            size = _claimed_size(self._open().metadata, group)
            if size > GROUP_BYTES:
                raise UserError(
                    f"has a row group that takes {size / 2**30:.1f} GiB of memory, and the limit is "
                    f"{GROUP_BYTES >> 30} GiB. Write it with smaller row groups (row_group_size)."
                )
            # One thread: there are many worker processes, and a thread pool does not survive the fork that makes them.
            table = self._open().read_row_group(group, use_threads=False)
            self._groups[group] = table, np.sum([_row_sizes(column) for column in table.columns], axis=0)
        self._groups.move_to_end(group)
        while len(self._groups) > 1 and sum(table.nbytes for table, _ in self._groups.values()) > CACHED_BYTES:
            self._groups.popitem(last=False)
        return self._groups[group]

    def _open(self) -> pyarrow.parquet.ParquetFile:
        if self._file is None or self._process != os.getpid():
            import pyarrow.parquet

            self._process = os.getpid()
            self._file = pyarrow.parquet.ParquetFile(self.path, read_dictionary=self._texts)
        return self._file


def _text_columns(schema: pyarrow.parquet.ParquetSchema) -> list[str]:
    """Return the paths of the text columns, which Arrow can keep as dictionary-encoded values."""
    columns = [schema.column(number) for number in range(len(schema))]
    return [column.path for column in columns if column.logical_type.type in ("STRING", "JSON", "ENUM")]


def _claimed_size(metadata: pyarrow.parquet.FileMetaData, group: int) -> int:
    """Return the approximate size of a row group in memory, in bytes, from the file's metadata."""
    chunks = metadata.row_group(group)
    size = 0
    for number in range(chunks.num_columns):
        chunk = chunks.column(number)
        size += chunk.total_uncompressed_size + chunk.num_values * max(8, metadata.schema.column(number).length)
    return size


def _row_sizes(array: pyarrow.Array | pyarrow.ChunkedArray) -> np.ndarray:
    """Return the approximate size of each row as Python objects, in bytes: int64 [rows]."""
    import pyarrow
    from pyarrow import compute

    if isinstance(array, pyarrow.ChunkedArray):
        return np.concatenate([np.zeros(0, np.int64), *map(_row_sizes, array.chunks)])
    sizes = np.full(len(array), _VALUE_BYTES)
    if isinstance(array, pyarrow.DictionaryArray):
        sizes += _numbers(compute.binary_length(array.dictionary).take(array.indices))
    elif isinstance(array, pyarrow.StructArray):
        sizes += sum(map(_row_sizes, array.flatten()))
    elif isinstance(array, pyarrow.MapArray):
        sizes += _sums_between(_row_sizes(array.keys) + _row_sizes(array.items), array.offsets)
    elif isinstance(array, (pyarrow.ListArray, pyarrow.LargeListArray)):
        sizes += _sums_between(_row_sizes(array.values), array.offsets)
    elif isinstance(array, pyarrow.FixedSizeListArray):
        borders = (np.arange(len(array) + 1) + array.offset) * array.type.list_size
        sizes += _sums_between(_row_sizes(array.values), borders)
    return sizes


def _sums_between(values: np.ndarray, borders: np.ndarray | pyarrow.Array) -> np.ndarray:
    """Return int64 [n], the sums of ``values`` (int64) from each of n + 1 borders to the next."""
    before = np.concatenate([[0], np.cumsum(values)])
    return np.diff(before[np.asarray(borders)])


def _numbers(array: pyarrow.Array) -> np.ndarray:
    """Return integers as int64 [n], null as 0."""
    return np.asarray(array.fill_null(0).to_numpy(zero_copy_only=False), np.int64)


@contextmanager
def _damage_explained() -> Iterator[None]:
    """Turn errors of Arrow about a damaged file into a UserError; errors of the disk stay an OSError."""
    import pyarrow

    try:
        yield
    except UserError:
        raise
    # A footer may promise rows that are not there, and text need not be UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"is not a whole Parquet file ({str(error)[:300]}). Make or copy it again.") from error
