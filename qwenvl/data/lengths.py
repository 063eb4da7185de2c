"""Exact lengths of all rows before training, from headers and text alone: nothing is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from qwenvl.data.collation import Event
from qwenvl.data.dataset import ConversationDataset, Measurement
from qwenvl.data.measures import MEASURES
from qwenvl.utilities.distributed import gather_objects, is_main_process, rank, world_size

_ROWS_A_TASK = 64


@dataclass(frozen=True, slots=True)
class RowLengths:
    """The lengths of a dataset's rows.

    Args:
        measures: :data:`~qwenvl.data.measures.MEASURES` [rows]; all zeros for a row that is left out.
        events: what there is to report of them.
    """

    measures: np.ndarray
    events: tuple[Event, ...]


class _Measured(Dataset[Measurement]):
    def __init__(self, dataset: ConversationDataset, rows: Sequence[int]) -> None:
        self._dataset = dataset
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Measurement:
        return self._dataset.measure(*self._dataset.locate(self._rows[index]))


def measure_lengths(dataset: ConversationDataset, workers: int) -> RowLengths:
    """Measure every row; each rank takes its share, and all get the result. Every rank has to call it.

    Args:
        dataset: not packed.
        workers: processes of each rank; 0 for none beside this one.

    Raises:
        UserError: a row must stop the run.
    """
    share = range(rank(), len(dataset), world_size())
    loader = DataLoader(_Measured(dataset, share), batch_size=_ROWS_A_TASK, num_workers=workers, collate_fn=list)
    measures = np.zeros(len(dataset), MEASURES)
    events: list[Event] = []
    with tqdm(total=len(share), desc="Measuring lengths", unit=" rows", disable=not is_main_process()) as progress:
        for place, measurements in enumerate(loader):
            for row, measurement in zip(share[place * _ROWS_A_TASK :], measurements, strict=False):
                if measurement.error is not None:
                    raise measurement.error
                measures[row] = measurement.measures
                events += measurement.events
            progress.update(len(measurements))
    gathered = gather_objects((measures[rank() :: world_size()], tuple(events)))
    for number, (of_rank, _) in enumerate(gathered):
        measures[number :: len(gathered)] = of_rank
    return RowLengths(measures, tuple(event for _, of_rank in gathered for event in of_rank))
