"""Read the bytes of text annotation files, plain or gzip."""

from __future__ import annotations

import gzip
import io
import os
import time
import zlib
from collections.abc import Iterator
from typing import IO, Any

from qwenvl.utils.errors import UserError

DECOMPRESSED_BYTES = 1 << 30
"""Most decompressed bytes of a gzip file: every process keeps all of it in memory."""

_PIECE = 1 << 21  # bytes read at a time
_CLOCK_TICK = 20_000_000  # ns: the clock of file times advances in steps of 1 to 10 ms
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")


class TextFile:
    """The bytes of a text file, plain or gzip, without its byte order mark.

    A plain file is read from disk; a compressed one is decompressed into memory, once per process. Pickling sends
    neither bytes nor handles: the other process opens the file again.

    Args:
        path: Text file.
        compressed: Whether it is gzip.

    Attributes:
        version: Real path, size, and times of the last changes of content and inode (ns), which identify the content.
        settled: Whether ``version`` is reliable: right after a write, the next change may get the same time.

    Raises:
        UserError: the file is UTF-16 text, not whole gzip, or gzip of more than :data:`DECOMPRESSED_BYTES`.
    """

    def __init__(self, path: str, compressed: bool = False) -> None:
        self.path = path
        self.compressed = compressed
        status = os.stat(path)
        self.version = (os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        self.settled = not 0 <= time.time_ns() - status.st_mtime_ns < _CLOCK_TICK
        self._data: bytes | None = None
        self._file: IO[bytes] | None = None
        start = self._pread(0, 3)
        if start.startswith(_OTHER_ENCODINGS):
            raise UserError("is UTF-16 text. Save it as UTF-8.")
        self.start = 3 if start == _BYTE_ORDER_MARK else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None, "_file": None}

    def read(self, start: int, end: int) -> bytes:
        """Return bytes ``start`` to ``end`` (exclusive), or to the end of the file where that comes first."""
        return self._pread(start, end - start)

    def pieces(self) -> Iterator[bytes]:
        """Yield all bytes, in pieces of any size."""
        position = self.start
        while piece := self._pread(position, _PIECE):
            yield piece
            position += len(piece)

    def first_character(self) -> str:
        """Return the first character that is not white space; "" in an empty file."""
        position = self.start
        while piece := self._pread(position, 4096):
            if stripped := piece.lstrip():
                return stripped[:4].decode(errors="replace")[:1]
            position += len(piece)
        return ""

    def check_unchanged(self) -> None:
        """Raise a UserError if the file is no longer the one that was opened."""
        self._check(os.stat(self.path))

    def _pread(self, start: int, size: int) -> bytes:
        if self.compressed:
            if self._data is None:
                self._data = _decompress(self.path)
            return self._data[start : start + size]
        if self._file is None:
            self._file = self._reopen()
        return os.pread(self._file.fileno(), size, start)  # no shared position: forked workers hold the same handle

    def _reopen(self) -> IO[bytes]:
        file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (kept open for the rows to come)
        try:
            self._check(os.fstat(file.fileno()))
        except UserError:
            file.close()
            raise
        return file

    def _check(self, status: os.stat_result) -> None:
        _, size, changed, _ = self.version
        if (status.st_size, status.st_mtime_ns) != (size, changed):
            raise UserError(f"{self.path} changed while it was in use. Start again, and do not change it meanwhile.")


def _decompress(path: str) -> bytes:
    content = io.BytesIO()
    try:
        with gzip.open(path) as file:
            while piece := file.read(_PIECE):
                content.write(piece)
                if content.tell() > DECOMPRESSED_BYTES:
                    raise UserError(
                        f"holds more than {DECOMPRESSED_BYTES >> 20} MiB of text, which every process would keep in "
                        "memory. Decompress it (gunzip): a plain file is read from disk."
                    )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"is a damaged or cut gzip file ({error}). Make or copy it again.") from error
    return content.getvalue()
