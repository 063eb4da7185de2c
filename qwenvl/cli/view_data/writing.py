"""Writes the records and images of the site by several processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from qwenvl.cli.view_data.images import ImageFiles
from qwenvl.cli.view_data.rows import Choice, MediaStatistics, look_at_rows
from qwenvl.cli.view_data.samples import Presenter
from qwenvl.data.dataset import ConversationDataset
from qwenvl.utils.cores import available_cores
from qwenvl.utils.errors import UserError
from qwenvl.utils.processes import in_processes

ROWS_A_TASK = 16


@dataclass
class Written:
    """Statistics and records of some rows.

    Args:
        rows: Number of rows.
        media: Media statistics by dataset.
        records: Records of the shown training rows, whose images are written.
    """

    rows: int = 0
    media: dict[str, MediaStatistics] = field(default_factory=lambda: defaultdict(MediaStatistics))
    records: list[dict[str, Any]] = field(default_factory=list)


class _Tasks(Dataset[Written]):
    """Processes the rows of one task per index. Each task has its own image folder, independent of the process."""

    def __init__(self, rows: ConversationDataset, tokenizer: Any, choice: Choice, site: Path) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._shown = frozenset(choice.shown.tolist())
        self._tasks = np.array_split(choice.counted, -(-len(choice.counted) // ROWS_A_TASK))
        self._site = site

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, number: int) -> Written:
        indices = self._tasks[number]
        presenter = Presenter(self._rows.encoder, self._tokenizer, ImageFiles(self._site, f"media/{number:05d}"))
        found = Written(len(indices))
        for index, look in look_at_rows(self._rows, indices):
            if look.plan is not None and look.row == look.rows:  # the last one has all media
                found.media[look.origin.dataset].add(look.plan)
            if index in self._shown:
                found.records.append(presenter.record(look))
        found.media = dict(found.media)
        return found


def write_rows(
    rows: ConversationDataset, tokenizer: Any, choice: Choice, site: Path, workers: int | None
) -> Iterator[Written]:
    """Write the images of the shown samples, and yield their records and statistics in the order of the rows.

    Args:
        rows: Rows of the run.
        tokenizer: Tokenizer of the checkpoint.
        choice: Rows to show and to count.
        site: Folder of the page.
        workers: Number of worker processes; None for one per core, 0 or 1 to work in this process.

    Raises:
        UserError: A process died.
    """
    tasks = _Tasks(rows, tokenizer, choice, site)
    processes = available_cores() if workers is None else workers
    try:
        yield from in_processes(tasks, len(tasks), processes)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"A process died while it wrote samples ({error}): out of memory, or a decoder crashed. "
            "Give --num_workers 1 to work in one process."
        ) from error
