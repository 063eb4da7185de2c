"""Calls that may take no longer than a given time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return what a function returns, or raise what it raises, if it does so in time.

    It runs in a thread of its own, because nothing can interrupt a library that waits inside C; the library has to
    release the interpreter's lock meanwhile. A call that is late is left behind: it goes on in its thread, with the
    memory it holds, until it ends by itself or with the process, which does not wait for it.

    Args:
        seconds: time it may take.
        function: what to call.

    Raises:
        TimeoutError: it took longer.
    """
    outcomes: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((function(), None))
        except BaseException as error:  # noqa: BLE001  raised again where it is waited for
            outcomes.put((None, error))

    threading.Thread(target=run, name="deadline", daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
