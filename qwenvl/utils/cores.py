"""Count the available CPU cores."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Return the number of cores that this process may use, often fewer than all under schedulers and in containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
