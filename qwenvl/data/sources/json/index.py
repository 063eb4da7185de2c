"""Index the rows of a text annotation file by offset, once; the index is kept in the cache folder and memory-mapped.

A mapped index takes no memory of a process: all processes of a machine share its pages.
"""

from __future__ import annotations

import functools
import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwenvl.data.sources.text_file import TextFile
from qwenvl.utils.cache import cache_folder, fingerprint, replacing

logger = logging.getLogger(__name__)

_FORMAT = 1  # version of the index files; raise it when their format changes
_HEADER = 256  # bytes: JSON, padded with spaces
_NUMBER = np.dtype("<i8")


@dataclass(frozen=True)
class RowIndex:
    """Offsets of the rows of a text.

    Args:
        offsets: int64 [rows + 1]. Row i is the bytes from ``offsets[i]`` to the byte before ``offsets[i + 1] - 1``:
            one newline, comma or bracket follows each row.
        lines: int64 [rows], the line of each row, from 0; None where row i is line i, or item i.
        fingerprint: Hash of the text.
        mapped: Whether the arrays are in a file that other processes can map as well.
    """

    offsets: np.ndarray
    lines: np.ndarray | None
    fingerprint: str
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1


def open_index(text: TextFile, layout: str, folder: str | None, build: Callable[[], RowIndex]) -> RowIndex:
    """Return the index of a file, from the cache folder if it has it.

    Args:
        text: Text file.
        layout: Layout of its rows.
        folder: Cache folder; None for the default one.
        build: Function that builds the index where it is missing or damaged.

    Raises:
        UserError: the file changes while it is read, or ``build`` raises it.
    """
    path = cache_folder(folder) / "annotations" / f"{fingerprint(_FORMAT, layout, *text.version)}.index"
    index = _load(path)
    if index is None:
        index = build()
        text.check_unchanged()
        index = _store(index, path) if text.settled else index
    return index


def _load(path: Path) -> RowIndex | None:
    """Map an index file; None if it is missing or damaged, in which case it is removed."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(_HEADER))
        numbers = np.memmap(path, _NUMBER, mode="r", offset=_HEADER).view(np.ndarray)
        rows, lines = header["rows"], header["lines"]
        if len(numbers) == rows + 1 + lines and zlib.crc32(numbers.data) == header["checksum"]:
            return RowIndex(numbers[: rows + 1], numbers[rows + 1 :] if lines else None, header["fingerprint"], True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        logger.info("The index %s cannot be read.", path, exc_info=True)
    try:
        path.unlink(missing_ok=True)
    except OSError:
        logger.info("The index %s cannot be removed.", path, exc_info=True)
    return None


def _store(index: RowIndex, path: Path) -> RowIndex:
    """Write an index file and return the mapped index; the given index where that is not possible."""
    arrays = [index.offsets] if index.lines is None else [index.offsets, index.lines]
    contents = [array.astype(_NUMBER, copy=False).data for array in arrays]
    checksum = 0
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    header = {
        "rows": len(index),
        "lines": 0 if index.lines is None else len(index),
        "fingerprint": index.fingerprint,
        "checksum": checksum,
    }
    try:
        with replacing(path, keep=True) as temporary, open(temporary, "wb") as file:
            file.write(json.dumps(header).ljust(_HEADER).encode())
            for content in contents:
                file.write(content)
    except OSError as error:
        _warn_unwritable(str(path.parent), str(error))
        return index
    return _load(path) or index


@functools.cache
def _warn_unwritable(folder: str, problem: str) -> None:
    """Log the warning once per run, not for every file and process."""
    from qwenvl.utils.distributed import is_first_to_say  # imports torch, which reading annotations does not need

    if is_first_to_say("index folder"):
        logger.warning(
            "Indexes of annotation files cannot be kept in %s (%s), so every process makes its own. Name another "
            "folder by --data_cache_dir.",
            folder,
            problem,
        )
