"""Short answers: exact match, numbers within 5 %, and edit distance."""

from __future__ import annotations

from qwenvl.metrics.base import Case, Metric, Scored, best

_THOUGHT_END = "</think>"
_THOUGHT_START = "<think>"
RELATIVE_CHANGE = 0.05
ANLS_THRESHOLD = 0.5


def final_answer(text: str) -> str:
    """Return the answer after its thought; an empty string where a thought is opened and not closed."""
    _, end, answer = text.rpartition(_THOUGHT_END)
    if end:
        return answer.lstrip()
    return "" if text.lstrip().startswith(_THOUGHT_START) else text


def exact(prediction: str, expected: str) -> float:
    """Return 1 for answers that are equal after stripping white space."""
    return float(prediction.strip() == expected.strip())


def relaxed(prediction: str, expected: str) -> float:
    """Return 1 for a number within 5 % of the expected one, and for words that are equal ignoring case.

    Follows ``relaxed_correctness`` of Pix2Struct's ``metrics.py``, the usual implementation: a per cent sign divides by
    100 (so "5%" is "0.05"), and an expected 0 has to be written the same.
    """
    found, wanted = _number(prediction), _number(expected)
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= RELATIVE_CHANGE)
    return float(prediction.strip().lower() == expected.strip().lower())


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, expected: str) -> float:
    """Return 1 - (edit distance / longer length), ignoring case; 0 from a normalised distance of 0.5 on.

    Biten et al. 2019, "Scene Text Visual Question Answering", equation 1: 1 - NL where NL < 0.5, else 0.
    """
    found, wanted = (" ".join(text.lower().split()) for text in (prediction, expected))
    longest = max(len(found), len(wanted))
    distance = edit_distance(found, wanted) / longest if longest else 0.0
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Return the fewest insertions, deletions and replacements of characters (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _exact(case: Case) -> Scored:
    return best(case, exact)


def _relaxed(case: Case) -> Scored:
    return best(case, relaxed)


def _anls(case: Case) -> Scored:
    return best(case, anls)


EXACT = Metric("exact_match", "exact match", "equal after stripping white space", _exact)
RELAXED = Metric("relaxed_match", "relaxed match", "ChartQA: numbers within 5 % (Methani et al. 2020)", _relaxed)
ANLS = Metric("anls", "ANLS", "Biten et al. 2019, threshold 0.5", _anls)
