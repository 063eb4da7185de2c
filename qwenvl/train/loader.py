"""Batches for one rank: worker processes, one thread each, in an order that any number of ranks agrees on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from qwenvl.arguments import TrainingArguments
from qwenvl.data.collation import Collator, Item
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.sampling import ShardedBatchSampler


class ShardedDataLoader(DataLoader[Item]):
    """A DataLoader over :class:`ShardedBatchSampler`; the Trainer tells it the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        sampler = self.batch_sampler
        assert isinstance(sampler, ShardedBatchSampler)
        sampler.set_epoch(epoch)


def build_loader(
    dataset: ConversationDataset, collator: Collator, args: TrainingArguments, *, batch_size: int, training: bool
) -> ShardedDataLoader:
    """Return this rank's loader.

    Args:
        dataset: the samples.
        collator: makes batches of them.
        args: seed and the ``dataloader_*`` flags.
        batch_size: rows a batch of one rank.
        training: shuffled training batches; otherwise evaluation batches in order.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    sampler = ShardedBatchSampler(
        len(dataset),
        batch_size,
        world_size=args.world_size,
        rank=args.process_index,
        shuffle=training,
        seed=seed,
    )
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
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        **options,
    )


def _one_thread(worker: int) -> None:
    """Many workers with many threads each fight over the cores."""
    del worker
    torch.set_num_threads(1)
