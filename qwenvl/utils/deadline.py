"""Call functions with a time limit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Call a function, and return its result or raise its error if it ends in time.

    The function runs in a thread of its own, because nothing can interrupt a library that waits inside C code; the
    library has to release the interpreter's lock meanwhile. A late call is abandoned: it continues in its thread, and
    keeps its memory, until it ends by itself or with the process, which does not wait for it.

    Args:
        seconds: Time limit.
        function: Function to call.

    Raises:
        TimeoutError: the function took longer.
    """
    outcomes: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((function(), None))
        except BaseException as error:  # noqa: BLE001  raised again by the waiting thread
            outcomes.put((None, error))

    threading.Thread(target=run, name="deadline", daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
