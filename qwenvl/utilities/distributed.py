"""Which of how many processes this is, before and after the process group exists."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from qwenvl.utilities.errors import UserError

T = TypeVar("T")


def is_initialized() -> bool:
    """Return whether the process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return dist.get_rank() if is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 when torchrun started none.

    ``WORLD_SIZE`` counts only beside ``RANK``: some clusters set it alone, to the number of machines.
    """
    if is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this is process 0 of all: the one that prints, and writes what exists once."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes, in order of rank; every process has to call it."""
    if not is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def wait_for_all() -> None:
    """Return when every process has called this."""
    if is_initialized():
        dist.barrier()


def from_main_process(function: Callable[[], T]) -> T:
    """Call a function in process 0 and return its result in all; every process has to call it.

    Raises:
        UserError: the function raised it; in all processes.
    """
    outcome: T | UserError | None = None
    if is_main_process():
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    outcome = gather_objects(outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome  # type: ignore[return-value]


def is_first_to_say(what: str) -> bool:
    """Return whether no other process of the job has asked this before, at any point of its life.

    Asks the store that torchrun keeps for its processes, so that nobody has to wait for the others. Where there is no
    store to ask, every process is the first.

    Args:
        what: name of the message.
    """
    if world_size() == 1:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=5),
        )
        return int(store.add(f"qwenvl/{what}/{attempt}", 1)) == 1
    except (KeyError, ValueError, RuntimeError):  # no address; nobody answers there
        return True


def shut_down() -> None:
    """Leave the process group, if there is one; call it when every process has finished its work."""
    if is_initialized():
        dist.destroy_process_group()
