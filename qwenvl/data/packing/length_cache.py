"""Cache the statistics of rows on disk: a file with one record per row, in which every run fills empty records.

A record holds the statistics of a row and a checksum of the statistics and the row number, and is written at the place
of the row. So nothing has to be closed, sorted or merged: the records of a killed run are kept, a record that was only
half written is detected by its checksum and counts as empty, and runs that count at the same time write the same bytes.
"""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

import numpy as np

from qwenvl.data.sample_stats import MEASURES

RECORD = np.dtype([("measures", MEASURES), ("check", np.uint64)])

_SALT = np.uint64(0x9E3779B97F4A7C15)  # so that the check of row 0 does not start from 0
_PRIME = np.uint64(0x100000001B3)  # of the 64-bit FNV-1a hash, applied here to whole words

logger = logging.getLogger(__name__)


class LengthCache:
    """Cached statistics of the rows of one annotation table.

    Args:
        path: File of this table under these settings, made with its folder by the first :meth:`write`; None to keep
            nothing.
        num_rows: Number of rows of the table.
    """

    def __init__(self, path: Path | None, num_rows: int) -> None:
        self._path = path
        self._bytes = num_rows * RECORD.itemsize
        self._num_rows = num_rows
        self._writable = True

    def read(self) -> np.ndarray:
        """Return the cached statistics: MEASURES [num_rows], zeros where a row is not counted yet."""
        try:
            if self._path is not None and self._path.exists():
                return self._checked(self._path)
        except OSError as error:
            logger.warning("The cache of counted lengths cannot be read: %s. They are counted again.", error)
        return np.zeros(self._num_rows, MEASURES)

    def _checked(self, path: Path) -> np.ndarray:
        """Read the file; damaged records become zeros."""
        if path.stat().st_size != self._bytes:
            logger.warning("%s does not have its expected size: its rows are counted again.", path)
            return np.zeros(self._num_rows, MEASURES)
        records = np.fromfile(path, RECORD)
        invalid = records["check"] != _checks(np.arange(self._num_rows), records["measures"])
        damaged = int((invalid & (records["check"] != 0)).sum())
        if damaged:
            logger.warning("%s: %d records are damaged: their rows are counted again.", path, damaged)
        records[invalid] = np.zeros((), RECORD)
        return records["measures"]

    def write(self, rows: np.ndarray, measures: np.ndarray) -> None:
        """Add counted rows. Warns once, and goes on without a cache, where the folder cannot be written to.

        Args:
            rows: int64 [n], numbers of the rows, ascending and unique.
            measures: MEASURES [n] of usable rows.
        """
        if self._path is None or not self._writable or not len(rows):
            return
        records = np.empty(len(rows), RECORD)
        records["measures"], records["check"] = measures, _checks(rows, measures)
        borders = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(file).st_size != self._bytes:
                    os.truncate(file, self._bytes)  # records that are not written yet read as zeros
                for start, stop in itertools.pairwise(borders):
                    os.pwrite(file, records[start:stop].tobytes(), int(rows[start]) * RECORD.itemsize)
            finally:
                os.close(file)
        except OSError as error:
            self._writable = False
            logger.warning("The cache of counted lengths cannot be written: %s. The next run counts them again.", error)


def _checks(rows: np.ndarray, measures: np.ndarray) -> np.ndarray:
    """Return a checksum of every record with its row: uint64 [n], never 0, the value of an empty record."""
    checks = rows.astype(np.uint64) ^ _SALT
    for name in MEASURES.names or ():
        checks = (checks ^ measures[name].astype(np.uint64)) * _PRIME
    return checks | np.uint64(1)
