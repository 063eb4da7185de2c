"""Find the starts of rows in JSON text, piece by piece with NumPy; no row is parsed, and no text is kept."""

from __future__ import annotations

import codecs

import numpy as np

SPACE = b" \t\r\n"  # white space that JSON allows between values

_QUOTE, _BACKSLASH, _COMMA, _NEWLINE = b'"\\,\n'
_OPENING, _CLOSING = b"{[", b"}]"
_ODD_BITS = np.uint64(0xAAAA_AAAA_AAAA_AAAA)


def _by_byte(default: int, values: dict[bytes, int]) -> np.ndarray:
    """Return int8 [256]: the value of each byte."""
    table = np.full(256, default, np.int8)
    for characters, value in values.items():
        table[list(characters)] = value
    return table


_STEPS = _by_byte(0, {_OPENING: 1, _CLOSING: -1})  # change of the depth by each byte
_PARTS = _by_byte(2, {SPACE + b",": 0})  # see ArrayScanner._split


class LineScanner:
    """Finds the lines of a text.

    Args:
        start: Offset of the first byte.
    """

    def __init__(self, start: int) -> None:
        self._position = start
        self._at_start = True  # of a line
        self._starts: list[np.ndarray] = []
        self._doubtful: list[np.ndarray] = []
        self._lines = 0

    def feed(self, piece: bytes) -> None:
        """Scan the next bytes."""
        data = np.frombuffer(piece, np.uint8)
        starts = np.flatnonzero(data == _NEWLINE) + 1
        if self._at_start:
            starts = np.concatenate([[0], starts])
        self._at_start = piece.endswith(b"\n")
        if self._at_start:
            starts = starts[:-1]  # the next piece begins with it, if there is one
        first = data[starts]
        doubtful = np.flatnonzero(_STEPS[first] != 1)
        self._doubtful.append(doubtful + self._lines)
        self._starts.append(starts + self._position)
        self._lines += len(starts)
        self._position += len(piece)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the starts of the lines, and the numbers of the lines that may be blank.

        Returns:
            int64 [lines + 1]: the first byte of each line, and finally one past the newline of the last line, whether
            it is there or not; int64 [n], numbers of the lines that do not start with a bracket, from 0, ascending.
        """
        end = self._position if self._at_start else self._position + 1
        starts = np.concatenate([*self._starts, [end]]).astype(np.int64)
        return starts, np.concatenate([*self._doubtful, []]).astype(np.int64)


class ArrayScanner:
    """Finds the commas between the items of a JSON array.

    Strings are found by counting quotes that are not escaped, items by the depth of brackets outside strings, as in
    Langdale and Lemire, "Parsing gigabytes of JSON per second", 2019: 64 bytes are 64 bits of a word. Only commas at
    depth 1 matter, where there is little text.

    Args:
        start: Offset of the first byte. The first character that is not white space is ``[``.
    """

    def __init__(self, start: int) -> None:
        self._position = start
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the first byte of the next piece, by a backslash at the end of this one
        self._parts = 0
        self._parts_at_cut = 0  # the last one
        self._items = 0
        self._cuts: list[np.ndarray] = []
        self._doubtful: list[np.ndarray] = []
        self._ended = False
        self._broken = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._buffer = np.empty(0, np.uint8)  # reused: the first write to new memory is slow

    def feed(self, piece: bytes) -> None:
        """Scan the next bytes."""
        self._check_utf8(piece)
        if not self._ended and not self._broken:
            piece = self._scan(piece)
        if self._ended and piece.strip(SPACE):
            self._broken = True

    def finish(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the starts of the items, and the numbers of items to parse because they may not be one value.

        Returns:
            int64 [items + 1]: the first byte of each item, and finally one past the closing bracket; one comma or
            bracket ends each item. int64 [n]: numbers of items that are not one object or list, from 0. None
            for a text that is not one whole array in UTF-8.
        """
        if self._broken or not self._ended or self._decoder.getstate()[0]:
            return None
        starts = np.concatenate(self._cuts) + 1
        if self._items == 1 and not self._parts:
            return starts[:1], np.empty(0, np.int64)
        return starts, np.concatenate(self._doubtful)

    def _check_utf8(self, piece: bytes) -> None:
        if not piece.isascii() or self._decoder.getstate()[0]:
            try:
                self._decoder.decode(piece)
            except UnicodeDecodeError:
                self._broken = True

    def _scan(self, piece: bytes) -> bytes:
        """Find the cuts of a piece; return the bytes after the end of the array."""
        padded = piece + b" " * (64 - len(piece) % 64)  # one byte or more, so that the last byte has a next one
        data = np.frombuffer(padded, np.uint8)
        in_string = self._strings(data, len(piece))
        # True for brackets, Y, y and _ too: outside strings, JSON has these in "Infinity" alone.
        places = _places(self._find(data, _OPENING[0], bits=0xD9) & ~in_string)
        steps = _STEPS[data[places]].astype(np.int64)
        places, steps = places[steps != 0], steps[steps != 0]
        depths = self._depth + np.cumsum(steps)
        ends = np.flatnonzero(depths == 0)
        if ends.size:
            self._ended = True
            places, steps, depths = (values[: ends[0] + 1] for values in (places, steps, depths))
        if len(places) and self._depth == 0:
            self._cuts.append(places[:1] + self._position)
        self._split(data[: len(piece)], places, depths - steps, depths, in_string)
        self._depth = int(depths[-1]) if len(depths) else self._depth
        self._position += len(piece)
        return piece[int(places[-1]) + 1 :] if self._ended else b""

    def _find(self, data: np.ndarray, byte: int, bits: int = 0xFF) -> np.ndarray:
        """Return uint64 [bytes / 64]: a bit per byte, lowest first, set where its ``bits`` equal those of ``byte``."""
        if len(self._buffer) < len(data):
            self._buffer = np.empty(len(data), np.uint8)
        same = self._buffer[: len(data)].view(np.bool_)
        if bits != 0xFF:
            data = np.bitwise_and(data, bits, out=self._buffer[: len(data)])
        np.equal(data, byte & bits, out=same)
        return np.packbits(same, bitorder="little").view("<u8")

    def _strings(self, data: np.ndarray, length: int) -> np.ndarray:
        """Return uint64 [bytes / 64]: a bit for each byte, set inside strings, opening quotes included."""
        escaped = _escaped(self._find(data, _BACKSLASH), self._escaped)
        self._escaped = bool(_bits(escaped, np.array([length]))[0])
        quotes = self._find(data, _QUOTE) & ~escaped
        inside = quotes.copy()
        for shift in (1, 2, 4, 8, 16, 32):  # turns every bit into the parity of the quotes up to it, in its word
            inside ^= inside << np.uint64(shift)
        parities = np.bitwise_xor.accumulate(np.bitwise_count(quotes) & 1)  # of the quotes up to each word's end
        before = np.concatenate([[False], parities[:-1]]) ^ self._in_string
        self._in_string ^= bool(parities[-1])
        return inside ^ (np.uint64(0) - before.astype(np.uint64))

    def _split(
        self, data: np.ndarray, brackets: np.ndarray, before: np.ndarray, depths: np.ndarray, in_string: np.ndarray
    ) -> None:
        """Record the commas at depth 1, each with the number of parts before it.

        An object or list counts as one part, any other byte that is not white space as two: an item that is not exactly
        one part must be parsed.

        Args:
            data: uint8 [bytes], the piece.
            brackets: int64 [n], its brackets outside strings.
            before: int64 [n], the depth before each of them.
            depths: int64 [n], the depth after each.
            in_string: uint64 [bytes / 64], result of :meth:`_strings`.
        """
        starts, stops = brackets[depths == 1] + 1, brackets[before == 1]
        if self._depth == 1:
            starts = np.concatenate([[0], starts])
        if len(starts) > len(stops):
            stops = np.concatenate([stops, [len(data)]])
        places = _ranges(starts, stops)
        characters = data[places]
        others = places[_PARTS[characters] != 0]
        commas = places[characters == _COMMA]
        commas = commas[~_bits(in_string, commas)]
        opens = brackets[(before == 1) & (depths == 2)]
        self._end_items(commas, np.searchsorted(opens, commas) + 2 * np.searchsorted(others, commas))
        self._parts += len(opens) + 2 * len(others)
        if self._ended:
            self._end_items(brackets[-1:], np.zeros(1, np.int64))

    def _end_items(self, cuts: np.ndarray, parts: np.ndarray) -> None:
        """Record where items end, and the number of parts before each of these places, counted from the last piece."""
        parts = parts + self._parts
        self._doubtful.append(np.flatnonzero(np.diff(parts, prepend=self._parts_at_cut) != 1) + self._items)
        self._parts_at_cut = int(parts[-1]) if len(parts) else self._parts_at_cut
        self._items += len(cuts)
        self._cuts.append(cuts + self._position)


def _places(words: np.ndarray) -> np.ndarray:
    """Return int64 [n]: the numbers of the bits that are set."""
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_))


def _bits(words: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return bool [n]: the bits at some places."""
    return (words[places >> 6] >> (places & 63).astype(np.uint64)) & np.uint64(1) != 0


def _escaped(backslashes: np.ndarray, first: bool) -> np.ndarray:
    """Return uint64 [n]: the bytes that an odd run of backslashes makes part of an escape.

    One subtraction flips the bits of a whole run; keeping every other bit gives the escaped bytes. The carry of a run
    into the next word is found by repeating this until nothing changes: twice, unless a run fills a word.

    Args:
        backslashes: uint64 [n], a bit for each byte.
        first: Whether the first byte is escaped.
    """
    escaped = np.zeros_like(backslashes)
    escaped[0] = first
    if not backslashes.any():
        return escaped
    carried = escaped
    while True:
        opening = backslashes & ~carried
        codes = (((opening << np.uint64(1)) | _ODD_BITS) - opening) ^ _ODD_BITS
        out = (codes & backslashes) >> np.uint64(63)
        following = np.concatenate([carried[:1], out[:-1]])
        if np.array_equal(following, carried):
            return codes ^ (backslashes | carried)
        carried = following


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return int64 [n]: the numbers from each start to its stop (exclusive), one range after the other."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    return np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)
