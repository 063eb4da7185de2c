"""Batches for one rank: worker processes, one thread each, in an order that any number of ranks agrees on."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch.utils.data import DataLoader

from qwenvl.arguments import TrainingArguments
from qwenvl.data.collation import Collator, Item
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.sampling import SampleOrder, ShardedBatchSampler, Sharding
from qwenvl.train.interruption import SIGNALS


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
        options = {
            "prefetch_factor": args.dataloader_prefetch_factor,
            "persistent_workers": args.dataloader_persistent_workers,
            "worker_init_fn": _one_thread,
        }
    return ShardedDataLoader(
        dataset,
        batch_sampler=ShardedBatchSampler(order, sharding),
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        **options,
    )


def _one_thread(worker: int) -> None:
    """Many workers with many threads each fight over the cores.

    Schedulers send SIGTERM to every process of a job; the rank still needs its workers for the step that it finishes,
    and ends them itself.
    """
    del worker
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
