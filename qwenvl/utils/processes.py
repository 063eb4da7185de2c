"""Run tasks in several processes, with results in order."""

from __future__ import annotations

import gc
import os
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


def in_processes(tasks: Dataset[T], count: int, workers: int) -> DataLoader[T]:
    """Return a loader that yields the result of each task, in order.

    Args:
        tasks: Dataset with one task per index.
        count: Number of tasks.
        workers: Number of processes; with 0 or 1, or for a single task, the tasks run in this process.
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
    """Prepare a worker: switch off the tokenizer's threads, since there are as many workers as cores.

    Objects inherited at the start are frozen, so that the garbage collector does not scan them again and again.
    """
    del worker
    gc.freeze()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
