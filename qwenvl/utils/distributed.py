"""Rank, world size and collective helpers, before and after the process group exists."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from qwenvl.utils.errors import UserError

T = TypeVar("T")

_POLL_SECONDS = 0.2
_FAILED = "qwenvl/failed"
"""Key in the process group's store: a process has ended with an error."""


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


def local_rank() -> int:
    """Return the number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def start_group(days: int = 7) -> None:
    """Create the process group on the CPU if torchrun started several processes and there is none.

    For tools whose processes work independently and gather results at the end.

    Args:
        days: Number of days that processes may wait for each other.
    """
    if world_size() > 1 and not is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=days))


def is_main_process() -> bool:
    """Return whether this is process 0 of all, which prints and writes shared files."""
    return rank() == 0


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes, in order of rank; every process has to call it."""
    if not is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def wait_for_all() -> None:
    """Return when every process has called this, however long that takes.

    Processes poll the group's store: waiting in a collective operation, for a process that writes a large checkpoint,
    would end the run after ``--ddp_timeout``.
    """
    if not is_initialized() or dist.get_world_size() == 1:
        return
    store = _group_store()
    if store is not None:
        turn = _next_turn(store)
        if store.add(f"{turn}/arrived", 1) == dist.get_world_size():
            store.set(f"{turn}/complete", "")
        _wait(store, f"{turn}/complete")
    dist.barrier()  # all are here; without torchrun, the store ends with process 0, which must not be ahead


def from_main_process(function: Callable[[], T]) -> T:
    """Call a function in process 0 and return its result in all; every process has to call it.

    The call may take any time: the other processes poll the group's store until process 0 is done, see
    :func:`wait_for_all`.

    Raises:
        UserError: the function raised it; in all processes.
    """
    if not is_initialized() or dist.get_world_size() == 1:
        return function()
    store = _group_store()
    done = "" if store is None else f"{_next_turn(store)}/done"
    result: list[T | UserError | None] = [None]
    if is_main_process():
        try:
            result = [function()]
        except UserError as error:
            result = [error]
        if store is not None:
            store.set(done, "")
    elif store is not None:
        _wait(store, done)
    dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]  # type: ignore[return-value]


def _group_store() -> Any:
    """Return the store through which the process group was formed, so that every process reaches it; None without one.

    A new connection could fail in one process, whose turns would then no longer be those of the others.
    """
    return dist.distributed_c10d._get_default_store()


def _next_turn(store: Any) -> str:
    """Return the name of this process's next wait, which is the same in all processes."""
    return f"qwenvl/turn {store.add(f'qwenvl/turns of rank {rank()}', 1)}"


def _wait(store: Any, key: str) -> None:
    """Wait until a process sets a key.

    Raises:
        DistNetworkError: A process ended with an error, so that the key may never be set.
    """
    while not store.check([key]):
        if store.check([_FAILED]):
            raise dist.DistNetworkError("another rank ended with an error")
        time.sleep(_POLL_SECONDS)


def report_failure() -> None:
    """Tell processes that wait for this one that it ends with an error."""
    if is_initialized() and (store := _group_store()) is not None:
        with suppress(RuntimeError):  # the store is gone, as are the others
            store.set(_FAILED, "")


def zeros_for_sums(count: int, device: torch.device) -> torch.Tensor:
    """Return float64 zeros, or float32 on devices without it: sums over millions of tokens need the digits."""
    return torch.zeros(count, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def is_first_to_say(what: str) -> bool:
    """Return whether this process is the first of the job to call this for a message.

    The answer comes from the store that torchrun keeps for its processes, so that no process has to wait for others.
    Without a store, every process is the first.

    Args:
        what: Name of the message.
    """
    if world_size() == 1:
        return True
    store = _store()
    try:
        return store is None or int(store.add(f"{_attempt()}/{what}", 1)) == 1
    except RuntimeError:  # the store is gone
        return True


def lost_contact(error: BaseException) -> bool:
    """Return whether an error means that the connection to another process of the job is lost."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):  # NCCL's, and the store's
        return True
    return isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)  # gloo has no class of its own


def _attempt() -> str:
    """Return the prefix of store keys of this start of the job: torchrun's store outlives a restart."""
    return f"qwenvl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    """Return a connection to the store that torchrun keeps for its processes; None where there is no such store."""
    # torchrun's store exists before its processes, however busy the machine; any other may start later or never.
    seconds = 30 if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 5
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=seconds),
        )
    except (KeyError, ValueError, RuntimeError):  # there is no address, or no answer from it
        return None


def shut_down() -> None:
    """Leave the process group, if there is one; call it when every process has finished its work."""
    if is_initialized():
        dist.destroy_process_group()


def run_program(main: Callable[[], int]) -> NoReturn:
    """Call a program's main function, and end the process with the exit code that it returns.

    One of several processes exits without finalizing Python: DeepSpeed and FSDP keep process groups alive after they
    are destroyed, and a gloo thread that releases a tensor during finalization aborts the process, so that the launcher
    would report a finished run as failed. Functions registered with ``atexit`` still run (experiment trackers need it).
    """
    if "RANK" not in os.environ:
        sys.exit(main())
    code = 1

    def leave() -> None:
        if code:
            report_failure()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    atexit.register(leave)  # registered first, so that it runs last
    try:
        code = main()
    except SystemExit as ended:  # --help
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    sys.exit(code)
