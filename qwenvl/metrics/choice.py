"""Multiple choice: read the chosen option from an answer."""

from __future__ import annotations

import re

from qwenvl.metrics.base import Case, Metric, Scored

_OPTION = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s+(.+?)(?=\s+\(?[A-Z][.):]\s|\s*$)", re.MULTILINE)
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_FIRST = re.compile(r"\W*(?:\(([A-Z])\)|([A-Z])[.):])(?:\s|$)")
_SAID = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?)\s*[\W_]*([A-Z])\b(?!')")


def read_options(question: str) -> dict[str, str]:
    """Return the options of a question by letter: ``A. cat``, ``(B) dog`` or ``C: cow``, on lines of their own or not.

    Letters have to follow each other from A; nothing is returned otherwise.
    """
    found = {letter: text.strip() for letter, text in _OPTION.findall(question)}
    letters = "".join(found)
    return found if len(letters) > 1 and letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)] else {}


def read_choice(answer: str, options: dict[str, str]) -> str | None:
    """Return the letter that an answer chooses; None where it is unclear.

    In this order: a letter alone ("B", "(b)", "**B**"); a letter in front ("B. cat", "(B) cat"); the last letter after
    answer, option or choice ("The answer is B"); the text of one option, alone; or of one option alone somewhere.

    Args:
        answer: Answer of the model.
        options: Options of the question by letter; where there are none, any letter is accepted.
    """
    text = answer.strip()
    letter = _letter(text)
    if letter is not None:
        return letter if not options or letter in options else None
    words = _words(text)
    same = [letter for letter, option in options.items() if _words(option) == words]
    inside = [letter for letter, option in options.items() if f" {_words(option)} " in f" {words} "]
    named = same or inside
    return named[0] if len(named) == 1 else None


def _letter(text: str) -> str | None:
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper()
    if first := _FIRST.match(text):
        return first[1] or first[2]
    said = _SAID.findall(text)
    return said[-1] if said else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def is_choice(expected: str) -> bool:
    """Return whether an expected answer is a letter: "B", "(B)" or "B."."""
    return re.fullmatch(r"\(?[A-Z]\)?\.?", expected.strip()) is not None


def _choice(case: Case) -> Scored:
    options = read_options(case.question)
    chosen = read_choice(case.prediction, options)
    wanted = {read_choice(expected, options) for expected in case.expected}
    return Scored(float(chosen is not None and chosen in wanted), readable=chosen is not None)


CHOICE = Metric("multiple_choice", "multiple choice", "the letter or option that the answer names", _choice)
