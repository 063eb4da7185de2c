"""Loss, units and tokens by dataset of the registry, between two log lines or over an evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenvl.config.rules.best_metric import OF_DATASET
from qwenvl.data.dataset import ConversationDataset
from qwenvl.models.loss.causal_lm import sample_lengths
from qwenvl.tasks.objective import weights_of_samples
from qwenvl.utils.devices import copy_to_device
from qwenvl.utils.distributed import rank, zeros_for_sums
from qwenvl.utils.errors import Origin

FILE_NAME = "dataset_losses.json"


def dataset_names(dataset: Any) -> tuple[str, ...]:
    """Return the registry names of a dataset's tables, in order; none for data of another kind."""
    if not isinstance(dataset, ConversationDataset):
        return ()
    return tuple(table.table.spec.name for table in dataset.tables)


class DatasetLosses:
    """Sums loss, weight of the units and tokens of this rank by dataset.

    Losses are added on their device; weights and tokens are known on the host. Nothing waits for the device before
    :meth:`take`. What a step has added counts once the step is taken.

    Args:
        names: Names of the datasets, the same on every rank.
        unit: Name of the units that the loss is averaged over, in the plural.
        device: Device of the losses.
    """

    def __init__(self, names: Sequence[str], unit: str, device: torch.device) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._unit = unit
        self._device = device
        self._beginning: dict[str, list[float]] = {}
        self.start_over()

    def start_over(self) -> None:
        """Reset to the sums of the checkpoint that the run resumed from, or to zero."""
        self._reset()
        for name, (loss, weight, tokens) in self._beginning.items() if rank() == 0 else ():
            if name in self._numbers:  # else the run trains on it no more
                number = self._numbers[name]
                self._losses[number] = loss
                self._counts[:, number] = weight, tokens

    def _reset(self) -> None:
        count = len(self._numbers)
        self._losses, self._of_step = (zeros_for_sums(count, self._device) for _ in range(2))
        self._counts, self._counts_of_step = np.zeros((2, count)), np.zeros((2, count))
        self._tells = False  # whether any loss was added

    def count(self, batch: dict[str, Any], origins: Sequence[Origin]) -> None:
        """Count the units and tokens of a prepared batch on the host, and add ``dataset_of_sample`` to it.

        Args:
            batch: Prepared batch.
            origins: Origins of its samples, in order.
        """
        numbers = [self._numbers[origin.dataset] for origin in origins]
        batch["dataset_of_sample"] = numbers
        np.add.at(self._counts_of_step[0], numbers, weights_of_samples(batch))
        np.add.at(self._counts_of_step[1], numbers, sample_lengths(batch).numpy())

    def add(self, losses: Tensor | None, batch: Mapping[str, Any]) -> None:
        """Add the losses of a batch's samples, float64 [samples] on the device; None where they are not known."""
        if losses is not None:
            numbers = copy_to_device(torch.tensor(batch["dataset_of_sample"], dtype=torch.long), self._device)
            self._of_step.index_add_(0, numbers, losses.to(self._of_step.dtype))
            self._tells = True

    def end_step(self, *, taken: bool) -> None:
        """Keep what the step has added, or drop it if the step was skipped."""
        if taken:
            self._losses += self._of_step
            self._counts += self._counts_of_step
        self._of_step.zero_()
        self._counts_of_step[:] = 0

    def take(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the figures since the last call, and reset them; every rank must call it.

        Returns:
            ``loss/NAME``, the mean over the units of a dataset; the number or total weight of its units, such as
            ``trained_tokens/NAME``; and ``tokens/NAME``, all tokens of its samples. Datasets without a sample since the
            last call are left out.
        """
        tells, sums = self._tells, self._sums(sum_over_ranks)
        self._reset()
        figures: dict[str, float] = {}
        for name, number in self._numbers.items():
            loss, weight, tokens = sums[:, number].tolist()
            if not tokens:
                continue
            own = {"loss": loss / weight if weight else math.nan} if tells else {}
            own |= {self._unit: round(weight, 6), "tokens": int(tokens)}
            figures |= {f"{figure}{OF_DATASET}{name}": value for figure, value in own.items()}
        return figures

    def _sums(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        """Return (loss, weight, tokens) of each dataset over all ranks, [3, datasets] on the host."""
        counts = torch.from_numpy(self._counts).to(self._losses.dtype).to(self._device)
        return sum_over_ranks(torch.cat([self._losses[None], counts])).cpu()

    def save(self, folder: Path, sum_over_ranks: Callable[[Tensor], Tensor], *, writes: bool) -> None:
        """Write the sums to a checkpoint; every rank must call it, and ranks with ``writes`` write."""
        sums = self._sums(sum_over_ranks)
        if writes:
            state = {name: sums[:, number].tolist() for name, number in self._numbers.items()}
            (folder / FILE_NAME).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def take_up(self, folder: str) -> None:
        """Continue with the sums of a checkpoint; one of another version has none."""
        path = Path(folder) / FILE_NAME
        if path.exists():
            self._beginning = json.loads(path.read_text(encoding="utf-8"))
            self.start_over()


def by_dataset(
    records: Iterable[tuple[str, Any]], metrics: Callable[[list[Any]], Mapping[str, float]]
) -> dict[str, float]:
    """Return the metrics of the records of each dataset, as ``accuracy/apples``.

    Args:
        records: Pairs of a dataset's name and a record.
        metrics: Function of records that returns metrics by name.
    """
    groups: dict[str, list[Any]] = {}
    for name, record in records:
        groups.setdefault(name, []).append(record)
    found = {name: metrics(group) for name, group in groups.items()}
    return {f"{key}{OF_DATASET}{name}": value for name, of_it in found.items() for key, value in of_it.items()}
