"""Errors that a user can fix. Entry points print their message without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

LONGEST_REASON = 1200
"""Most characters of :attr:`SampleError.reason`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sample comes from, for messages.

    Args:
        dataset: Registry name of the dataset.
        file: Annotation file, or name and split of a Hugging Face dataset.
        line: Line of a JSONL file, or item of a JSON array, Parquet table or dataset; counted from 1.
        id: Value of ``id`` in the sample, where it has one.
        member: Place inside a packed row, counted from 1; None in an ordinary row.
    """

    dataset: str
    file: str
    line: int
    id: str | None = None
    member: int | None = None

    def record(self, category: str, reason: str) -> dict[str, Any]:
        """Return a line of ``bad_samples.jsonl`` or ``*_problems.jsonl``: the origin and its problem."""
        return {**asdict(self), "category": category, "reason": reason}

    def __str__(self) -> str:
        member = f", member {self.member}" if self.member is not None else ""
        sample = f" (id {self.id[:200]!r})" if self.id is not None else ""
        return f"dataset {self.dataset!r}, {self.file}:{self.line}{member}{sample}"


class UserError(ValueError):
    """A mistake in the user's input: the message says what, where, why and what to change."""


class SampleError(UserError):
    """One sample that cannot be used.

    Args:
        category: Short stable name of the problem, such as ``missing_file`` or ``no_answer``; counts are kept by it.
        reason: Sentences with the problem and what to change. They may quote hostile samples: unprintable characters
            are escaped, and long texts are cut.
        origin: Dataset, file and line of the sample; filled in by :meth:`at` where the raiser does not know them.
    """

    def __init__(self, category: str, reason: str, origin: Origin | None = None) -> None:
        reason = _printable(reason)
        super().__init__(category, reason, origin)  # all arguments, so that the error survives pickling by workers
        self.category = category
        self.reason = reason
        self.origin = origin

    def at(self, origin: Origin) -> SampleError:
        """Return the same error with an origin, unless it has one."""
        return self if self.origin is not None else SampleError(self.category, self.reason, origin)

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}" if self.origin is not None else self.reason


def _printable(text: str) -> str:
    text = text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON // 2]} ... {text[-LONGEST_REASON // 2 :]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the known names nearest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {', '.join(repr(item) for item in near)}?" if near else ""
