"""Checks all rows of a dataset in several processes; results come in the order of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from qwenvl.cli.check_image.samples import DIGEST_BYTES, SampleChecker, content_digest
from qwenvl.data.sources.table import AnnotationTable
from qwenvl.utils.errors import Origin, SampleError, UserError
from qwenvl.utils.processes import in_processes

ROWS_A_TASK = 128


class Problem(NamedTuple):
    """A problem of a sample or of an unreadable row.

    Args:
        row: Index of the row in its table, from 0.
        member: Index of the sample in its row, from 0.
        origin: Dataset, file and line of the sample.
        category: Category of :class:`qwenvl.utils.errors.SampleError`.
        reason: Explanation for the user.
    """

    row: int
    member: int
    origin: Origin
    category: str
    reason: str


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """Results of some consecutive rows.

    Args:
        samples: int64 [rows], number of samples of each row; 0 for an unreadable one.
        media: int64 [rows], number of images and videos of each row.
        digests: Content hashes of all samples, concatenated.
        problems: Problems in the order of the rows.
        error: Error that has to stop the check.
        unread_keys: Unused keys of the samples, as named in messages.
        remarks: Number of samples by kind of :data:`qwenvl.data.sample_stats.REMARKS`.
    """

    samples: np.ndarray
    media: np.ndarray
    digests: bytes = b""
    problems: list[Problem] = field(default_factory=list)
    error: UserError | None = None
    unread_keys: set[str] = field(default_factory=set)
    remarks: Counter[str] = field(default_factory=Counter)


class _Tasks(Dataset[CheckedRows]):
    def __init__(self, table: AnnotationTable, checker: SampleChecker) -> None:
        self._table = table
        self._checker = checker

    def __len__(self) -> int:
        return -(-len(self._table) // ROWS_A_TASK)

    def __getitem__(self, index: int) -> CheckedRows:
        rows = range(index * ROWS_A_TASK, min((index + 1) * ROWS_A_TASK, len(self._table)))
        checked = CheckedRows(np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64))
        digests = list[bytes]()
        try:
            for place, row in enumerate(rows):
                digests += self._check(row, place, checked)
        except UserError as error:  # a file changed, there is no video backend, ...
            return CheckedRows(checked.samples, checked.media, error=error)
        return replace(checked, digests=b"".join(digests))

    def _check(self, row: int, place: int, checked: CheckedRows) -> list[bytes]:
        """Check a row, add its results to ``checked``, and return the hashes of its samples."""
        try:
            samples = self._table[row]
        except SampleError as error:
            origin = error.origin or self._table.origin(row)
            checked.problems.append(Problem(row, 0, origin, error.category, error.reason))
            return []
        findings = self._checker.check_row(samples)
        checked.samples[place] = len(samples)
        checked.media[place] = sum(finding.media for finding in findings)
        checked.unread_keys.update(key for finding in findings for key in finding.unread_keys)
        checked.remarks.update(kind for finding in findings for kind in finding.remarks)
        for member, (sample, finding) in enumerate(zip(samples, findings, strict=True)):
            for problem in finding.problems:
                checked.problems.append(Problem(row, member, sample.origin, problem.category, problem.reason))
        return [content_digest(sample) for sample in samples]


def check_table(table: AnnotationTable, checker: SampleChecker, workers: int) -> Iterator[CheckedRows]:
    """Check all rows of a table, and yield the results in chunks.

    Args:
        table: Annotations of the dataset.
        checker: Checker of samples.
        workers: Number of worker processes; 0 or 1 to work in this process.

    Raises:
        UserError: The check cannot continue: a file changed, or a process died.
    """
    tasks = _Tasks(table, checker)
    try:
        for checked in in_processes(tasks, len(tasks), workers):
            if checked.error is not None:
                raise checked.error
            yield checked
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A process died while it checked dataset {table.spec.name!r} ({error}): out of memory, or a decoder "
            "crashed. Give --workers 1 to see after which row."
        ) from error


def find_duplicates(table: AnnotationTable, samples: np.ndarray, digests: bytes) -> Iterator[Problem]:
    """Yield a problem for every sample with the same content as an earlier one.

    Args:
        table: Annotations of the dataset.
        samples: int64 [rows], number of samples of each row.
        digests: Content hashes of all samples, concatenated.
    """
    keys = np.frombuffer(digests, dtype=f"S{DIGEST_BYTES}")
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    ends = np.cumsum(samples)
    for sample in np.flatnonzero(first[which] != np.arange(len(keys))).tolist():
        (row, member), (original, of_row) = (_locate(one, ends, samples) for one in (sample, int(first[which[sample]])))
        origin, earlier = table[row][member].origin, table.origin(original)
        place = f"line {earlier.line}" + (f", member {of_row + 1}" if samples[original] > 1 else "")
        file = f" of {earlier.file}" if earlier.file != origin.file else ""
        reason = f"it has the same turns and media as {place}{file}. Remove one of them."
        yield Problem(row, member, origin, "duplicate", reason)


def _locate(sample: int, ends: np.ndarray, samples: np.ndarray) -> tuple[int, int]:
    """Return the row of a sample and its index in the row, from 0."""
    row = int(np.searchsorted(ends, sample, side="right"))
    return row, sample - int(ends[row] - samples[row])
