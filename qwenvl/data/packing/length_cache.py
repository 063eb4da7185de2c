"""Counted rows on disk: a file with one record a row, which every run fills where it is still empty.

A record holds what was counted and a checksum of it and its row, and is written where the row has its place. So nothing
has to be closed, sorted or put together: a run that is killed has kept what it wrote, a record of which half reached
the disk is known by its checksum and counts as empty, and runs that count at the same time write the same bytes.
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
_PRIME = np.uint64(0x100000001B3)  # of the 64-bit FNV-1a hash, which is followed here by whole words

logger = logging.getLogger(__name__)


class LengthCache:
    """What is known of the rows of one annotation table.

    Args:
        path: file of this table under these settings, made with its folder by the first :meth:`write`; None to keep
            nothing.
        num_rows: rows of the table.
    """

    def __init__(self, path: Path | None, num_rows: int) -> None:
        self._path = path
        self._bytes = num_rows * RECORD.itemsize
        self._num_rows = num_rows
        self._writable = True

    def read(self) -> np.ndarray:
        """Return what is known: MEASURES [num_rows], zeros where a row is not counted yet."""
        try:
            if self._path is not None and self._path.exists():
                return self._checked(self._path)
        except OSError as error:
            logger.warning("Counted lengths cannot be read: %s. They are counted anew.", error)
        return np.zeros(self._num_rows, MEASURES)

    def _checked(self, path: Path) -> np.ndarray:
        """Read the file; what is not as it was written becomes zeros."""
        if path.stat().st_size != self._bytes:
            logger.warning("%s has lost its size: its rows are counted anew.", path)
            return np.zeros(self._num_rows, MEASURES)
        records = np.fromfile(path, RECORD)
        invalid = records["check"] != _checks(np.arange(self._num_rows), records["measures"])
        damaged = int((invalid & (records["check"] != 0)).sum())
        if damaged:
            logger.warning("%s: %d records are not as written, and their rows counted anew.", path, damaged)
        records[invalid] = np.zeros((), RECORD)
        return records["measures"]

    def write(self, rows: np.ndarray, measures: np.ndarray) -> None:
        """Add what was counted. Warns once, and goes on without, where the folder cannot be written to.

        Args:
            rows: int64 [n], ascending, each once.
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
                    os.truncate(file, self._bytes)  # what is not written yet reads as zeros
                for start, stop in itertools.pairwise(borders):
                    os.pwrite(file, records[start:stop].tobytes(), int(rows[start]) * RECORD.itemsize)
            finally:
                os.close(file)
        except OSError as error:
            self._writable = False
            logger.warning("Counted lengths cannot be kept: %s. The next run counts them again.", error)


def _checks(rows: np.ndarray, measures: np.ndarray) -> np.ndarray:
    """Return a checksum of every record with its row: uint64 [n], never 0, which is what an empty record holds."""
    checks = rows.astype(np.uint64) ^ _SALT
    for name in MEASURES.names or ():
        checks = (checks ^ measures[name].astype(np.uint64)) * _PRIME
    return checks | np.uint64(1)
