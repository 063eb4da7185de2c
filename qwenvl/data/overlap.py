"""Count rows that a run both trains and evaluates on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from qwenvl.data.dataset import SampledTable


def shared_rows(train: Sequence[SampledTable], evaluation: Sequence[SampledTable]) -> dict[str, int]:
    """Return how many rows of each evaluation dataset are training rows too, by its name; nothing where none are.

    Rows are the same if they are at the same place in the same file, whatever the names and other files of the entries
    are.
    """
    used: dict[object, list[np.ndarray]] = {}
    for table in train:
        for source, rows in _rows_of_sources(table):
            used.setdefault(source, []).append(rows)
    counts = dict.fromkeys((table.table.spec.name for table in evaluation), 0)
    for table in evaluation:
        for source, rows in _rows_of_sources(table):
            if source in used:
                counts[table.table.spec.name] += int(np.isin(rows, np.concatenate(used[source])).sum())
    return {name: count for name, count in counts.items() if count}


def _rows_of_sources(table: SampledTable) -> Iterator[tuple[object, np.ndarray]]:
    """Yield each file of a table (or its Hugging Face dataset) with the rows of it that are used, each once."""
    spec, rows = table.table.spec, np.unique(table.rows)
    first = 0
    for file in table.table.files:
        inside = rows[(rows >= first) & (rows < first + len(file))] - first
        yield spec.hf_dataset or os.path.realpath(file.path), inside
        first += len(file)
