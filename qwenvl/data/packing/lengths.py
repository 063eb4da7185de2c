"""Count the exact lengths of all rows before training, from headers and text alone, without decoding media.

Process 0 counts on all cores it may use, caches the lengths, and sends the result to the other processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import Event
from qwenvl.data.packing.length_cache import LengthCache
from qwenvl.data.sample_stats import MEASURES, NOTHING, Measures
from qwenvl.utils.cache import fingerprint
from qwenvl.utils.cores import available_cores
from qwenvl.utils.distributed import from_main_process
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import shows_bars
from qwenvl.utils.processes import in_processes

_COUNTING = 4  # version of the counting: raise it when the statistics change, so that older caches are not read
_ROWS_A_TASK = 64  # counted together, and again if the run is killed meanwhile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowLengths:
    """The lengths of a dataset's rows.

    Args:
        measures: :data:`~qwenvl.data.sample_stats.MEASURES` [rows]; all zeros for a row that is left out.
        events: Events to report of the rows, once for a row that is used several times.
    """

    measures: np.ndarray
    events: tuple[Event, ...]


def measure_lengths(dataset: ConversationDataset, cache: Path | None = None, workers: int | None = None) -> RowLengths:
    """Measure every row in process 0; all processes get the result, and all have to call this.

    Rows that an earlier run counted under the same settings come from the cache. Rows with a problem are checked in
    every run, so that a missing file is found once it is there. A changed image under the same name is not noticed; if
    its row is then too long, training reports it and leaves it out.

    Args:
        dataset: Dataset without packs.
        cache: Cache folder; None to keep nothing.
        workers: Number of processes; 0 or 1 for none besides this one. Default: the number of available cores.

    Raises:
        UserError: a row must stop the run; of several, the first in the order of the rows.
    """
    processes = available_cores() if workers is None else workers
    return from_main_process(lambda: _measure(dataset, cache, processes))


@dataclass(frozen=True, slots=True)
class _Task:
    """Some rows of a table: int64 [n], ascending."""

    table: int
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class _Counted:
    """Results of a task: for this run, and for the cache (MEASURES [n] each); see Measurement."""

    measures: np.ndarray
    whole: np.ndarray
    events: tuple[Event, ...]
    error: UserError | None


class _Tasks(Dataset[_Counted]):
    """Counts the rows of one task per index; ``known`` holds the cached MEASURES [rows] of every table."""

    def __init__(self, dataset: ConversationDataset, tasks: Sequence[_Task], known: Sequence[np.ndarray]) -> None:
        self._dataset = dataset
        self._tasks = tasks
        self._known = known

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> _Counted:
        task = self._tasks[index]
        known = [Measures(*one) if one != NOTHING else None for one in self._known[task.table][task.rows].tolist()]
        rows = zip(task.rows.tolist(), known, strict=True)
        results = [self._dataset.measure(task.table, row, of_row) for row, of_row in rows]
        return _Counted(
            np.array([one.measures for one in results], MEASURES),
            np.array([one.whole or NOTHING for one in results], MEASURES),
            tuple(event for one in results for event in one.events),
            next((one.error for one in results if one.error is not None), None),
        )


def _measure(dataset: ConversationDataset, cache: Path | None, workers: int) -> RowLengths:
    started = time.monotonic()
    caches = _open_caches(dataset, cache)
    measures = [one.read() for one in caches]
    tasks = _plan_tasks(dataset, measures)
    missing = sum(int((measures[task.table][task.rows]["samples"] == 0).sum()) for task in tasks)
    events = list[Event]()
    hidden = not missing or not shows_bars()
    with tqdm(total=missing, desc="Counting lengths", unit=" rows", disable=hidden) as progress:
        for task, counted in zip(tasks, _count(_Tasks(dataset, tasks, measures), workers), strict=True):
            new = measures[task.table][task.rows]["samples"] == 0
            keep = new & (counted.whole["samples"] > 0)
            caches[task.table].write(task.rows[keep], counted.whole[keep])
            if counted.error is not None:
                raise counted.error
            measures[task.table][task.rows] = counted.measures
            events += counted.events
            progress.update(int(new.sum()))
    rows = sum(len(np.unique(table.rows)) for table in dataset.tables)
    logger.info(
        "Lengths: %d rows counted, %d from the cache, in %.1f s.", missing, rows - missing, time.monotonic() - started
    )
    used = [of_table[table.rows] for of_table, table in zip(measures, dataset.tables, strict=True)]
    return RowLengths(np.concatenate(used), tuple(events))


def _open_caches(dataset: ConversationDataset, cache: Path | None) -> list[LengthCache]:
    """Open the cache of every table; equal tables under equal settings share it, whatever dataset they belong to."""
    if cache is None:
        return [LengthCache(None, len(table.table)) for table in dataset.tables]
    of_encoder = dataset.encoder.fingerprint()
    opened = []
    for table in dataset.tables:
        spec = table.table.spec
        options = {key: repr(value) for key, value in spec.options.items()}
        key = fingerprint(_COUNTING, table.table.fingerprint, spec.data_path, options, of_encoder)
        opened.append(LengthCache(cache / "lengths" / f"{key}.counts", len(table.table)))
    return opened


def _plan_tasks(dataset: ConversationDataset, known: Sequence[np.ndarray]) -> list[_Task]:
    """Return tasks for rows that are not cached, and for rows that are too long, to report them with their place."""
    tasks = list[_Task]()
    for number, table in enumerate(dataset.tables):
        rows = np.unique(table.rows)
        of_rows = known[number][rows]
        rows = rows[(of_rows["samples"] == 0) | (of_rows["tokens"] > dataset.encoder.max_length)]
        tasks += [_Task(number, rows[n : n + _ROWS_A_TASK]) for n in range(0, len(rows), _ROWS_A_TASK)]
    return tasks


def _count(tasks: _Tasks, workers: int) -> Iterator[_Counted]:
    """Run the tasks in worker processes, and yield the results in order."""
    return iter(in_processes(tasks, len(tasks), workers))
