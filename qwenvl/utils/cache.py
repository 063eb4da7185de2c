"""Cache results on disk under names that are hashes of the content that they depend on."""

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
    """Return the cache folder: ``folder``, or ``$QWENVL_CACHE``, or ``qwenvl`` in the user's own cache.

    The user's own cache is ``$XDG_CACHE_HOME``, or ``~/.cache``. Nothing is created.
    """
    chosen = folder or os.environ.get("QWENVL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qwenvl"


def fingerprint(*parts: Any) -> str:
    """Return a hash of values as a short text.

    Args:
        parts: Values that JSON can hold; the order of keys in dictionaries does not matter.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()


def new_hash() -> hashlib.blake2b:
    """Return a new hash object, to be updated with the bytes of some content."""
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def array_hash(*arrays: np.ndarray) -> str:
    """Return a hash of the content, type and shape of arrays as a short text."""
    state = new_hash()
    for array in arrays:
        state.update(f"{array.dtype}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


@contextmanager
def replacing(path: Path, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it is moved to ``path`` in one step if the block ends without an error.

    Readers, and other processes that write the same file, see the old file or the new one and never half of it.

    Args:
        path: File to write.
        keep: Whether a file that exists by then stays, because other processes may have mapped it: on network file
            systems, they can lose the mapping of a replaced file.
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
    """Give a file another name, unless the name is taken; return False where the file system cannot."""
    try:
        path.hardlink_to(file)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True
