"""Rows of JSON annotation files: where each one starts and ends is found once, and rows are parsed when asked for.

Only the index (8 to 16 bytes a row) stays in memory, never the parsed rows: millions of small Python objects would be
copied into every worker, page by page, as their reference counts change.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from typing import IO, Any

import numpy as np

from qwenvl.utilities.cache import new_hash
from qwenvl.utilities.errors import SampleError, UserError

_CHUNK = 1 << 24  # bytes read at a time while lines are counted
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")
_BETWEEN = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class TextFile:
    """The bytes of a text file, plain or gzip, without its byte order mark.

    A plain file is read where it lies; a compressed one is decompressed into memory, once a process. Pickling sends
    neither bytes nor handles: the other process opens the file again.

    Args:
        path: the file.
        compressed: it is gzip.
    """

    def __init__(self, path: str, compressed: bool = False) -> None:
        self.path = path
        self.compressed = compressed
        self._signature = _signature(os.stat(path))
        self._data: bytes | None = None
        self._file: IO[bytes] | None = None
        start = self._pread(0, 3)
        if start.startswith(_OTHER_ENCODINGS):
            raise UserError("is UTF-16 text. Save it as UTF-8.")
        self.start = 3 if start == _BYTE_ORDER_MARK else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None, "_file": None}

    def read(self, start: int, end: int | None = None) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive; None for the end of the file)."""
        if end is not None:
            return self._pread(start, end - start)
        pieces = []
        while piece := self._pread(start, _CHUNK):
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""
        digest, position = new_hash(), self.start
        while piece := self._pread(position, _CHUNK):
            digest.update(piece)
            position += len(piece)
        return digest.hexdigest()

    def first_character(self) -> str:
        """The first character that is not white space; "" in an empty file."""
        position = self.start
        while piece := self._pread(position, 4096):
            if stripped := piece.lstrip():
                return stripped[:4].decode(errors="replace")[:1]
            position += len(piece)
        return ""

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
        if _signature(os.fstat(file.fileno())) != self._signature:
            file.close()
            raise UserError(f"{self.path} changed while it was in use. Start again, and leave it alone meanwhile.")
        return file


class JsonLines:
    """The rows of a JSON Lines file.

    Args:
        text: the file.
    """

    def __init__(self, text: TextFile) -> None:
        self.path = text.path
        self._text = text
        self._offsets = _line_offsets(text)
        self._rows = _filled_lines(text, self._offsets)

    @property
    def fingerprint(self) -> str:
        """See :class:`qwenvl.data.annotations.Rows`."""
        return self._text.fingerprint

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._rows is None else len(self._rows)

    def line(self, row: int) -> int:
        """The row's line in the file, counted from 1, blank lines included."""
        return (row if self._rows is None else int(self._rows[row])) + 1

    def record(self, row: int) -> Any:
        """Parse a row; see :class:`qwenvl.data.annotations.Rows`."""
        line = self.line(row) - 1
        return _parse_row(self._text.read(int(self._offsets[line]), int(self._offsets[line + 1])))


class JsonArray:
    """The items of a JSON array.

    The whole file is parsed once, on opening, an item at a time.

    Args:
        text: the file.

    Raises:
        UserError: the file is not one JSON array.
    """

    def __init__(self, text: TextFile) -> None:
        self.path = text.path
        self._text = text
        content = _decode(text.read(text.start))
        spans = _item_spans(content)
        self._spans = text.start + _to_byte_offsets(content, spans)

    @property
    def fingerprint(self) -> str:
        """See :class:`qwenvl.data.annotations.Rows`."""
        return self._text.fingerprint

    def __len__(self) -> int:
        return len(self._spans)

    def line(self, row: int) -> int:
        """The item's place in the array, counted from 1."""
        return row + 1

    def record(self, row: int) -> Any:
        """Parse an item; see :class:`qwenvl.data.annotations.Rows`."""
        start, end = self._spans[row]
        return _parse_row(self._text.read(int(start), int(end)))


def _signature(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _decompress(path: str) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"is a damaged or cut gzip file ({error}). Make or copy it again.") from error


def _line_offsets(text: TextFile) -> np.ndarray:
    """Return int64 ``[lines + 1]``: the byte where each line starts, and at last the end of the file."""
    position, found = text.start, [np.array([text.start], dtype=np.int64)]
    while piece := text.read(position, position + _CHUNK):
        newlines = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == ord("\n"))
        found.append(newlines + (position + 1))
        position += len(piece)
    offsets = np.concatenate(found)
    return offsets if offsets[-1] == position else np.append(offsets, position)


def _filled_lines(text: TextFile, offsets: np.ndarray) -> np.ndarray | None:
    """Return int64 ``[rows]``: the lines that are not blank, counted from 0; None where all are filled.

    A line of two bytes or more that starts with ``{`` or ``[`` is filled; the few others are looked at one by one.
    """
    first = np.concatenate(list(_first_bytes(text, offsets)) or [np.empty(0, dtype=np.uint8)])
    filled = (first == ord("{")) | (first == ord("["))
    for line in np.flatnonzero(~filled):
        filled[line] = bool(text.read(int(offsets[line]), int(offsets[line + 1])).strip())
    return None if filled.all() else np.flatnonzero(filled)


def _first_bytes(text: TextFile, offsets: np.ndarray) -> Any:
    """Yield uint8 arrays: the first byte of each line, in order."""
    starts = offsets[:-1]
    position = text.start
    while piece := text.read(position, position + _CHUNK):
        low, high = np.searchsorted(starts, [position, position + len(piece)])
        yield np.frombuffer(piece, dtype=np.uint8)[starts[low:high] - position]
        position += len(piece)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def _parse_row(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError("bad_json", f"byte {error.start + 1} is not UTF-8 text. Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise SampleError("bad_json", f"broken JSON at column {error.colno}: {_explain(error)}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise SampleError("bad_json", f"the JSON cannot be read: {error}") from error


def _explain(error: json.JSONDecodeError) -> str:
    start, end = max(error.pos - 30, 0), error.pos + 30
    excerpt = error.doc[start:end].replace("\n", "\\n")
    if not error.doc[error.pos :].strip():
        return f"{error.msg}; the text ends there, after {excerpt!r}."
    return f"{error.msg}, near {excerpt!r}."


def _item_spans(content: str) -> np.ndarray:
    """Return int64 ``[items, 2]``: the characters where each item of a JSON array starts and ends."""
    spans: list[tuple[int, int]] = []
    position = _skip(content, _skip(content, 0) + 1)  # the caller saw the opening bracket
    try:
        while content[position : position + 1] != "]" or spans:
            _, end = _DECODER.raw_decode(content, position)
            spans.append((position, end))
            position = _skip(content, end)
            if content[position : position + 1] == "]":
                break
            if content[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", content, position)
            position = _skip(content, position + 1)
        if _skip(content, position + 1) != len(content):
            raise json.JSONDecodeError("Extra data after the array", content, position + 1)
    except json.JSONDecodeError as error:
        raise UserError(f"line {error.lineno}: broken JSON at column {error.colno}: {_explain(error)}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise UserError(f"item {len(spans) + 1}: the JSON cannot be read: {error}") from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _skip(content: str, position: int) -> int:
    match = _BETWEEN.match(content, position)
    return match.end() if match else position


def _to_byte_offsets(content: str, spans: np.ndarray) -> np.ndarray:
    """Turn character offsets, in ascending order, into offsets of the UTF-8 bytes."""
    if content.isascii():
        return spans
    characters = spans.reshape(-1).tolist()
    offsets, byte, previous = [], 0, 0
    for position in characters:
        byte += len(content[previous:position].encode("utf-8"))
        offsets.append(byte)
        previous = position
    return np.array(offsets, dtype=np.int64).reshape(-1, 2)
