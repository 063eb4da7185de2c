"""Tasks done by several processes, their results in order."""

from __future__ import annotations

import gc
import os
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


def in_processes(tasks: Dataset[T], count: int, workers: int) -> DataLoader[T]:
    """Return what yields the result of each task, in their order.

    Args:
        tasks: one an index.
        count: how many there are.
        workers: processes; with 0 or 1, or a single task, this one does them.
    """
    processes = min(workers, count)
    return DataLoader(
        tasks,
        batch_size=None,
        num_workers=processes if processes > 1 else 0,
        collate_fn=_as_it_is,
        worker_init_fn=_one_thread,
    )


def _as_it_is(result: Any) -> Any:
    return result


def _one_thread(worker: int) -> None:
    """Workers are as many as cores; the tokenizer's own threads would only get into their way.

    What a worker was started with stays: the garbage collector need not look at it again and again.
    """
    del worker
    gc.freeze()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
