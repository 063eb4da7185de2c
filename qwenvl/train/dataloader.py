"""DataLoader of one rank: its share of an order that does not depend on the number of ranks, and its workers."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from qwenvl.config import TrainingArguments
from qwenvl.data.collator import Collator
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import Item
from qwenvl.data.sampler import SampleOrder, ShardedBatchSampler, Sharding
from qwenvl.models.vision.grid_inputs import GridDescriber, shown_grids
from qwenvl.tasks.objective import Objective
from qwenvl.train.callbacks.preemption import SIGNALS
from qwenvl.utils.allocator import keep_freed_memory


@dataclass(frozen=True)
class PreparingCollator:
    """Collates samples and prepares the model's inputs, in the process of the data loader, which then pins all of it.

    Keys of the batch: those of :meth:`qwenvl.tasks.objective.Objective.prepare`; ``total_weight`` and ``num_units``,
    the total weight and the number of its units; ``vision_grids``, the inputs of the vision tower that depend on the
    sizes of the images; ``events``, ``error`` and ``origins`` of its samples, for the trainer.

    Args:
        collator: Collator of batches.
        objective: Objective of the training.
        grids: Computes inputs of the vision tower.
        merge_size: Side of the square of patches that become one token.
    """

    collator: Collator
    objective: Objective
    grids: GridDescriber
    merge_size: int

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return the prepared batch of items."""
        batch = self.collator(items)
        told = {name: batch.pop(name) for name in ("events", "error", "origins")}
        counted = {"total_weight": self.objective.total_weight(batch), "num_units": self.objective.count(batch)}
        described = self.grids.describe(shown_grids(batch.get("media", ()), self.merge_size))
        return {**self.objective.prepare(batch), **counted, "vision_grids": described, **told}


class ShardedDataLoader(DataLoader[Item]):
    """A DataLoader over :class:`ShardedBatchSampler`; the Trainer sets its epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch."""
        sampler = self.batch_sampler
        assert isinstance(sampler, ShardedBatchSampler)
        sampler.set_epoch(epoch)


def build_loader(
    dataset: ConversationDataset,
    collator: Collator | PreparingCollator,
    args: TrainingArguments,
    order: SampleOrder,
    sharding: Sharding,
) -> ShardedDataLoader:
    """Return this rank's loader.

    Args:
        dataset: Dataset of samples.
        collator: Collator of batches.
        args: Arguments of the run, with the ``dataloader_*`` flags.
        order: Order of the dataset's indices.
        sharding: Share of this rank.
    """
    workers = args.dataloader_num_workers
    options: dict[str, Any] = {}
    if workers > 0:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
        options = {
            "prefetch_factor": args.dataloader_prefetch_factor,
            "persistent_workers": args.dataloader_persistent_workers,
            "worker_init_fn": prepare_worker,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        }
    return ShardedDataLoader(
        dataset,
        batch_sampler=ShardedBatchSampler(order, sharding),
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        **options,
    )


def prepare_worker(worker: int) -> None:
    """Make a worker reuse freed memory, and ignore the signals that end a job. torch limits it to one thread.

    Schedulers send SIGTERM to every process of a job, but the rank needs its workers until the end of the step, and
    ends them itself.
    """
    del worker
    keep_freed_memory()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill the workers of loaders that are still open, for instance after an error.

    At exit, multiprocessing sends SIGTERM to the workers, which ignore it, and would wait for them forever; so would
    the launcher and all other ranks.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for worker in multiprocessing.active_children():
        worker.kill()
