"""Read rows of JSON annotation files: an index has their offsets, and each row is parsed on access.

Parsed rows never stay in memory: millions of small Python objects would be copied into every worker, page by page, as
their reference counts change.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from qwenvl.data.sources.json.index import RowIndex, open_index
from qwenvl.data.sources.json.mistakes import explain, find_mistake
from qwenvl.data.sources.json.scan import ArrayScanner, LineScanner
from qwenvl.data.sources.text_file import TextFile
from qwenvl.utils.cache import new_hash
from qwenvl.utils.errors import SampleError, UserError

Layout = Literal["lines", "array"]

_SLICE = 1 << 18  # bytes scanned at a time: small enough that the intermediate arrays fit into the CPU cache


class JsonRows:
    """The lines of a JSON Lines file that are not blank, or the items of a JSON array.

    Pickling sends the path; the other process maps the same index.

    Args:
        text: Text file.
        layout: Layout of the file: lines, or one array.
        cache_dir: Folder of the index; None for the default one.
        check_ends: Whether to parse the first and the last row.

    Raises:
        UserError: the layout is an array and the text is not, or the first or last row cannot be parsed.
    """

    schema = None  # every row has its own

    def __init__(self, text: TextFile, layout: Layout, cache_dir: str | None = None, check_ends: bool = True) -> None:
        self.path = text.path
        self._text = text
        self._layout = layout
        self._cache_dir = cache_dir
        self._opened: RowIndex | None = None
        for row in {0, len(self) - 1} if len(self) and check_ends else ():
            self._check(row)

    def __getstate__(self) -> dict[str, Any]:
        mapped = self._opened is not None and self._opened.mapped
        return {**self.__dict__, "_opened": None} if mapped else self.__dict__

    def __len__(self) -> int:
        return len(self._index)

    @property
    def fingerprint(self) -> str:
        """See :class:`qwenvl.data.sources.table.Rows`."""
        return self._index.fingerprint

    def line(self, row: int) -> int:
        """Return the row's line in the file, blank lines included, or its place in the array; counted from 1."""
        lines = self._index.lines
        return (row if lines is None else int(lines[row])) + 1

    def record(self, row: int) -> Any:
        """Parse a row; see :class:`qwenvl.data.sources.table.Rows`."""
        return _parse(self.text(row))

    def text(self, row: int) -> bytes:
        """Return the row as it is in the file, without the white space around it."""
        start, following = self._index.offsets[row : row + 2].tolist()
        data = self._text.read(start, following - 1)
        return data.strip() if self._layout == "array" else data.rstrip()

    @property
    def _index(self) -> RowIndex:
        if self._opened is None:
            build = _index_lines if self._layout == "lines" else _index_array
            self._opened = open_index(self._text, self._layout, self._cache_dir, lambda: build(self._text))
        return self._opened

    def _check(self, row: int) -> None:
        try:
            self.record(row)
        except SampleError as error:
            if self._layout == "array":
                raise find_mistake(self._text) from error
            raise UserError(f"line {self.line(row)}: {error.reason}{self._other_layout()}") from error

    def _other_layout(self) -> str:
        """Return advice, with a space in front, on a file of lines that starts as something else does."""
        start = self.text(0)
        if start.startswith(b"["):
            return " The file starts with '[', so it holds one array: name it .json."
        if start == b"{":
            return " The file's first sample goes on over several lines: write each on one line, or an array as .json."
        return ""


def _index_lines(text: TextFile) -> RowIndex:
    scanner = LineScanner(text.start)
    digest = _feed(scanner, text)
    offsets, doubtful = scanner.finish()
    filled = np.ones(len(offsets) - 1, np.bool_)
    for line in doubtful.tolist():
        filled[line] = bool(text.read(int(offsets[line]), int(offsets[line + 1])).strip())
    if filled.all():
        return RowIndex(offsets, None, digest)
    # A row extends to the next line with content: blank lines are white space at its end.
    lines = np.flatnonzero(filled)
    return RowIndex(offsets[[*lines, -1]], lines, digest)


def _index_array(text: TextFile) -> RowIndex:
    scanner = ArrayScanner(text.start)
    digest = _feed(scanner, text)
    found = scanner.finish()
    if found is None:
        raise find_mistake(text)
    index = RowIndex(found[0], None, digest)
    for item in found[1].tolist():
        start, following = index.offsets[item : item + 2].tolist()
        try:
            _parse(text.read(start, following - 1))
        except SampleError as error:
            raise find_mistake(text) from error
    return index


def _feed(scanner: LineScanner | ArrayScanner, text: TextFile) -> str:
    """Feed a text to a scanner, and return the hash of the text, computed in another thread."""
    digest = new_hash()
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashed: Future[None] | None = None
        for piece in text.pieces():
            if hashed is not None:
                hashed.result()
            hashed = pool.submit(digest.update, piece)
            for start in range(0, len(piece), _SLICE):
                scanner.feed(piece[start : start + _SLICE])
    return digest.hexdigest()


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError("bad_json", f"byte {error.start + 1} is not UTF-8 text. Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of it, " if b"\n" in data else ""
        raise SampleError("bad_json", f"broken JSON at {line}column {error.colno}: {explain(error)}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise SampleError("bad_json", f"the JSON cannot be read: {error}") from error
