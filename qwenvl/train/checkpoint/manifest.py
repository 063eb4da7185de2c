"""Manifest of a checkpoint's files, which detects truncated or changed files before training resumes from them.

Every file is recorded with its size in bytes and, by its size, with

- ``blake2b``: BLAKE2b hash of a file of up to 64 MiB (in manifests of earlier versions: of any file);
- ``sample``: hash of 64 pieces of 1 MiB of a larger file, evenly spaced from its first byte to its last;
- ``blocks``: hash of the hashes of all blocks of 64 MiB of a larger file. It takes minutes for large models, in which
  no rank waits: it is added after the checkpoint is published (:class:`BackgroundHasher`), if it is wanted at all.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwenvl.utils.cache import new_hash
from qwenvl.utils.cores import available_cores

logger = logging.getLogger(__name__)

NAME = "manifest.json"

_SMALL = 1 << 26
_PIECES, _PIECE = 64, 1 << 20
_BLOCK = 1 << 26
_CHUNK = 1 << 24
_BACKGROUND_THREADS = 4  # hashlib releases the GIL; the other cores belong to training

Span = tuple[int, int]
"""Start and end of a part of a file, in bytes."""


def write(folder: Path) -> None:
    """Write the manifest of a folder and its subfolders, in seconds: without ``blocks``."""
    files = [folder / name for name in _names(folder)]
    with ThreadPoolExecutor(_threads()) as pool:
        entries = list(pool.map(_describe, files))
    _store(folder, {_name(file, folder): entry for file, entry in zip(files, entries, strict=True)})


def add_blocks(folder: Path, threads: int = _BACKGROUND_THREADS) -> None:
    """Read every large file of a folder once, and add its ``blocks`` to the manifest."""
    files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    large = [name for name, entry in files.items() if "sample" in entry]
    with ThreadPoolExecutor(threads) as pool:
        for name in large:
            files[name]["blocks"] = _hash_blocks(folder / name, pool)
    if large:
        _store(folder, files)


def problem_of(folder: Path, *, every_byte: bool = True) -> str | None:
    """Return the first difference between a folder and its manifest; None if there is none, or no manifest.

    Additional files are ignored.

    Args:
        folder: Folder with a manifest.
        every_byte: Whether to compare ``blocks`` where the manifest has them, rather than ``sample``.
    """
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{NAME} cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, and {expected['bytes']} were saved"
    for name in _changed(folder, files, every_byte=every_byte):
        return f"{name} is not as it was saved (if you changed it yourself, remove {NAME})"
    return None


def _changed(folder: Path, files: Mapping[str, Mapping[str, Any]], *, every_byte: bool) -> Iterator[str]:
    """Yield the names of files whose content is not the recorded one."""
    by_block = [name for name, entry in files.items() if every_byte and "blocks" in entry]
    others = [name for name in files if name not in by_block]
    with ThreadPoolExecutor(_threads()) as pool:
        for name, same in zip(others, pool.map(lambda one: _is_as(folder / one, files[one]), others), strict=True):
            if not same:
                yield name
        for name in by_block:
            if _hash_blocks(folder / name, pool) != files[name]["blocks"]:
                yield name


def _is_as(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file of the recorded size has the recorded hash, or the hash of its pieces."""
    size = entry["bytes"]
    if "blake2b" in entry:
        return _hash(file, [(0, size)]) == entry["blake2b"]
    return _hash(file, _pieces(size)) == entry["sample"]


def _describe(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size <= _SMALL:
        return {"bytes": size, "blake2b": _hash(file, [(0, size)])}
    return {"bytes": size, "sample": _hash(file, _pieces(size))}


def _pieces(size: int) -> list[Span]:
    """Return the sampled parts of a large file; the first and the last byte are among them."""
    step = (size - _PIECE) / (_PIECES - 1)
    starts = [round(number * step) for number in range(_PIECES)]
    return [(start, start + _PIECE) for start in starts]


def _hash_blocks(file: Path, pool: ThreadPoolExecutor) -> str:
    size = file.stat().st_size
    spans = [[(start, min(start + _BLOCK, size))] for start in range(0, size, _BLOCK)]
    digest = new_hash()
    for found in pool.map(lambda span: _hash(file, span), spans):
        digest.update(bytes.fromhex(found))
    return digest.hexdigest()


def _hash(file: Path, spans: Sequence[Span]) -> str:
    """Return the hash of parts of a file, one after another."""
    digest = new_hash()
    view = memoryview(bytearray(min(_CHUNK, max(end - start for start, end in spans))))
    with file.open("rb", buffering=0) as content:
        for start, end in spans:
            content.seek(start)
            left = end - start
            while left and (size := content.readinto(view[:left])):
                digest.update(view[:size])
                left -= size
    return digest.hexdigest()


def _store(folder: Path, files: Mapping[str, Any]) -> None:
    """Write the manifest in one step, so that a run which stops meanwhile leaves the old one."""
    draft = folder / f".{NAME}"
    draft.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / NAME)


def _names(folder: Path) -> list[str]:
    """Return every file below ``folder``, as a path relative to it with forward slashes."""
    return sorted(_name(path, folder) for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _threads() -> int:
    return min(32, available_cores())


class BackgroundHasher:
    """Adds ``blocks`` to the manifests of published checkpoints in a thread of its own.

    A run that must end sooner does not wait for it: a manifest without ``blocks`` is valid.
    """

    def __init__(self, add: Callable[[Path], None] = add_blocks) -> None:
        self._add = add
        self._folders: queue.Queue[Path] = queue.Queue()
        self._thread: threading.Thread | None = None

    def add(self, folder: Path) -> None:
        """Hash a folder after the earlier ones, without waiting for it."""
        self._folders.put(folder)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hasher", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until all folders are hashed."""
        self._folders.join()

    def _run(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # this thread and its children
        while True:
            folder = self._folders.get()
            try:
                self._add(folder)
            except FileNotFoundError:  # removed meanwhile, by --save_total_limit
                logger.debug("%s is gone, and not hashed.", folder)
            except (OSError, ValueError) as error:
                logger.warning("%s/%s keeps the hashes of samples alone: %s.", folder, NAME, error)
            finally:
                self._folders.task_done()
