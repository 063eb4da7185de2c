"""Batches for one rank: worker processes, one thread each, in an order that any number of ranks agrees on."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from typing import Any

from torch.utils.data import DataLoader

from qwenvl.config import TrainingArguments
from qwenvl.data.collator import Collator
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import Item
from qwenvl.data.sampler import SampleOrder, ShardedBatchSampler, Sharding
from qwenvl.train.callbacks.preemption import SIGNALS
from qwenvl.utils.allocator import keep_freed_memory


class ShardedDataLoader(DataLoader[Item]):
    """A DataLoader over :class:`ShardedBatchSampler`; the Trainer tells it the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        sampler = self.batch_sampler
        assert isinstance(sampler, ShardedBatchSampler)
        sampler.set_epoch(epoch)


def build_loader(
    dataset: ConversationDataset, collator: Collator, args: TrainingArguments, order: SampleOrder, sharding: Sharding
) -> ShardedDataLoader:
    """Return this rank's loader.

    Args:
        dataset: the samples.
        collator: makes batches of them.
        args: the ``dataloader_*`` flags.
        order: of the dataset's indices.
        sharding: which of them are this rank's.
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
    """Let a worker reuse its buffers, and outlive the signals that end a job. One thread is what torch gives it.

    Schedulers send SIGTERM to every process of a job; the rank still needs its workers for the step that it finishes,
    and ends them itself.
    """
    del worker
    keep_freed_memory()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """End the workers of a loader that nobody has closed, as after an error.

    At its end, a process asks its workers to end by SIGTERM, which they ignore, and waits for them: for ever, and the
    launcher and all other ranks with it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an error
    for worker in multiprocessing.active_children():
        worker.kill()
