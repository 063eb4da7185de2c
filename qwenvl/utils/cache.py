"""What was computed once and can be computed again: kept on disk under names made of the content it came from."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_DIGEST_BYTES = 20


def cache_folder(folder: str | None = None) -> Path:
    """Return the folder of everything cached: ``folder``, or ``$QWENVL_CACHE``, or ``qwenvl`` in the user's own cache.

    The user's own cache is ``$XDG_CACHE_HOME``, or ``~/.cache``. Nothing is created.
    """
    chosen = folder or os.environ.get("QWENVL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qwenvl"


def fingerprint(*parts: Any) -> str:
    """Return a short text that is the same for equal parts and another one otherwise.

    Args:
        parts: values that JSON can hold; dictionaries count as equal in any order.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()


def new_hash() -> hashlib.blake2b:
    """Return the hash that content is identified by, to be fed with the content's bytes."""
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def array_hash(*arrays: np.ndarray) -> str:
    """Return a short text that is the same for arrays of equal content and another one otherwise."""
    state = new_hash()
    for array in arrays:
        state.update(f"{array.dtype}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


@contextmanager
def replacing(path: Path, keep: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; moved to ``path`` in one step if the block ends without an error.

    Readers, and other processes that write the same, see the old file or the new one and never half of it.

    Args:
        path: the file.
        keep: one that stands there by then stays, as others may have mapped it: over the network, a file system can
            take from them what is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        if not (keep and _link(temporary, path)):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(file: Path, path: Path) -> bool:
    """Give a file a second name, unless the name is taken; False where the file system cannot."""
    try:
        path.hardlink_to(file)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True
