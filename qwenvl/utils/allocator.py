"""Settings of the memory allocator."""

from __future__ import annotations

import ctypes
import os

_MIB = 1 << 20
# Numbers of the options in glibc's malloc.h, and the values set: see mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * _MIB  # glibc refuses more
_KEPT = 256 * _MIB


def use_expandable_segments() -> None:
    """Make torch's CUDA allocator grow its segments, unless the environment has settings for it.

    Rows differ in length from step to step, and fixed segments that fit one length are left over as fragments by the
    next. torch reads the variable when it first allocates CUDA memory, not when it is imported.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_freed_memory() -> bool:
    """Make this process keep up to 256 MiB of freed memory for its next buffers.

    By default, glibc returns large buffers to the system as soon as they are freed. A process that decodes one image
    after another then requests the same pages again and again, and the system clears them each time: 1,400 page faults
    and a fifth of the time for an image of a megapixel.

    Returns:
        Whether it was possible: other C libraries than glibc have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, _KEPT),
        (_M_TOP_PAD, _KEPT // 4),
    )
    accepted = [mallopt(option, value) == 1 for option, value in settings]
    return all(accepted)
