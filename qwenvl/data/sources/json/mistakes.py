"""Find the line of the first syntax error in a JSON array: slow, for arrays that the fast scanner rejected."""

from __future__ import annotations

import codecs
import json
import re

from qwenvl.data.sources.text_file import TextFile
from qwenvl.utils.errors import UserError

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 100  # characters: an error nearer than this to the end of a piece may be a word, number or escape cut in two


def explain(error: json.JSONDecodeError) -> str:
    """Return what is wrong with JSON, and near which text."""
    unterminated = error.msg.startswith("Unterminated string")  # its position is the start of the string
    place = len(error.doc) if unterminated else error.pos
    excerpt = error.doc[max(place - 30, 0) : place + 30].replace("\n", "\\n")
    if not error.doc[place:].strip():
        return f"{error.msg.removesuffix(' starting at')}; the text ends there, after {excerpt!r}."
    if error.doc[place] == "'":
        return f"{error.msg}, near {excerpt!r}. It looks printed by Python: write it with json.dump."
    return f"{error.msg}, near {excerpt!r}."


def find_mistake(text: TextFile) -> UserError:
    """Read an array item by item up to its first syntax error, with no more than one item and a piece in memory.

    Args:
        text: File whose first character is ``[``.

    Returns:
        The error, with its line.
    """
    reader = _Reader(text)
    items = 0
    try:
        reader.take("[")
        while reader.next_character() != "]" or items:
            reader.skip_value()
            items += 1
            if reader.next_character() == "]":
                break
            reader.take(",", "Expecting ',' or ']'")
        reader.take("]")
        if reader.next_character():
            reader.take("", "Extra data after the array")
    except json.JSONDecodeError as error:
        return reader.locate(error)
    except UserError as error:
        return error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return UserError(f"item {items + 1}: the JSON cannot be read: {error}")
    return UserError("changed while it was read. Start again, and do not change it meanwhile.")


class _Reader:
    """Reader of a text that keeps only the characters not read yet."""

    def __init__(self, text: TextFile) -> None:
        self._pieces = text.pieces()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._content = ""
        self._position = 0
        self._ended = False
        self._lines = 0  # before the content
        self._columns = 0  # before the content, on its first line

    def next_character(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            space = _SPACE.match(self._content, self._position)
            self._position = space.end() if space else self._position
            if self._position < len(self._content) or self._ended:
                return self._content[self._position : self._position + 1]
            self._read_more()

    def take(self, character: str, otherwise: str = "") -> None:
        """Skip a character, which must be the next one."""
        if self.next_character() != character:
            raise json.JSONDecodeError(otherwise, self._content, self._position)
        self._position += 1

    def skip_value(self) -> None:
        """Skip one value of JSON."""
        self.next_character()
        while True:
            try:
                _, end = _DECODER.raw_decode(self._content, self._position)
                if end < len(self._content) or self._ended:
                    self._position = end
                    return
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._content) - _CUT or error.msg.startswith("Unterminated string")
                if self._ended or not cut:
                    raise
            self._read_more()

    def locate(self, error: json.JSONDecodeError) -> UserError:
        """Return a syntax error with its line and column in the file."""
        line = self._lines + error.lineno
        column = error.colno + (self._columns if error.lineno == 1 else 0)
        return UserError(f"line {line}: broken JSON at column {column}: {explain(error)}")

    def _read_more(self) -> None:
        """Drop the skipped text, and extend the rest to twice its length or more."""
        passed, parts = self._content[: self._position], [self._content[self._position :]]
        self._lines += passed.count("\n")
        self._columns = len(passed) - passed.rfind("\n") - 1 + (self._columns if "\n" not in passed else 0)
        missing = len(parts[0]) + 1
        while missing > 0 and not self._ended:
            piece = next(self._pieces, b"")
            self._ended = not piece
            try:
                parts.append(self._decoder.decode(piece, final=self._ended))
            except UnicodeDecodeError as error:
                before = self._lines + "".join(parts).count("\n") + error.object.count(b"\n", 0, error.start)
                raise UserError(f"line {before + 1} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
            missing -= len(parts[-1])
        self._content, self._position = "".join(parts), 0
