"""Rows of a Parquet annotation file, read by row groups."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qwenvl.utilities.cache import fingerprint
from qwenvl.utilities.errors import SampleError, UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

PARQUET_MAGIC = b"PAR1"
CACHED_BYTES = 256 << 20


class ParquetRows:
    """The rows of a Parquet file.

    Row groups stay in memory once read, the least recently used going when they pass :data:`CACHED_BYTES` together
    (a process). A file of many large row groups is slow in random order; JSON Lines has no such limit.

    Args:
        path: the file.

    Raises:
        UserError: it is not a Parquet file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: pyarrow.parquet.ParquetFile | None = None
        self._process = -1  # that opened the file: a forked worker opens it again
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()
        with _damage_explained():
            self.schema: pyarrow.Schema = self._open().schema_arrow
            metadata = self._open().metadata
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
        """Of its footer (schema, sizes and statistics of every column), its size and the time it was written.

        Such a file can hold pictures: reading all of it takes too long.
        """
        status = os.stat(self.path)
        with _damage_explained():
            footer = repr(self._open().metadata.to_dict())
        return fingerprint(footer, status.st_size, status.st_mtime_ns)

    def line(self, row: int) -> int:
        """The row's place in the table, counted from 1."""
        return row + 1

    def record(self, row: int) -> dict[str, Any]:
        """Read a row; see :class:`qwenvl.data.annotations.Rows`."""
        group = bisect_right(self._ends, row)
        start = self._ends[group - 1] if group else 0
        try:
            with _damage_explained():
                record: dict[str, Any] = self._group(group).slice(row - start, 1).to_pylist()[0]
        except UserError as error:
            raise SampleError("unreadable_file", f"{self.path} {error}") from error.__cause__
        return record

    def text(self, row: int) -> None:
        """None: the rows of a table have no text."""

    def _group(self, group: int) -> pyarrow.Table:
        if group not in self._groups:
            # One thread: worker processes are many, and a thread pool does not survive the fork that makes them.
            self._groups[group] = self._open().read_row_group(group, use_threads=False)
        self._groups.move_to_end(group)
        while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > CACHED_BYTES:
            self._groups.popitem(last=False)
        return self._groups[group]

    def _open(self) -> pyarrow.parquet.ParquetFile:
        if self._file is None or self._process != os.getpid():
            import pyarrow.parquet

            self._process = os.getpid()
            self._file = pyarrow.parquet.ParquetFile(self.path)
        return self._file


@contextmanager
def _damage_explained() -> Iterator[None]:
    """Turn what Arrow meets in a damaged file into a UserError; what the disk says stays an OSError."""
    import pyarrow

    try:
        yield
    # A footer may promise rows that are not there, and text need not be UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"is not a whole Parquet file ({str(error)[:300]}). Make or copy it again.") from error
