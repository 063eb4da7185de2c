"""How many processes are worth starting."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Return the number of cores that this process may use: schedulers and containers often leave it fewer than all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
