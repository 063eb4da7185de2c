"""Answers to the same questions at every evaluation of a run, kept beside its checkpoints.

``eval_answers.jsonl``: a line for each step and sample, as :mod:`qwenvl.metrics.predictions` writes it, with ``step``
and ``score``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenvl.evaluate.scoring import evaluate
from qwenvl.metrics.predictions import Prediction
from qwenvl.utils.cache import replacing

logger = logging.getLogger(__name__)

FILE_NAME = "eval_answers.jsonl"


@dataclass(frozen=True)
class Answered:
    """A scored answer of one evaluation.

    Args:
        step: Optimizer steps before the evaluation.
        line: Sample with its answer.
        score: Score, 0 to 1 (correct).
    """

    step: int
    line: Prediction
    score: float

    def to_json(self) -> str:
        """Return the line of the file with its newline."""
        values = {"step": self.step, "score": self.score, **json.loads(self.line.to_json())}
        return json.dumps(values, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Answered:
        """Read a line of the file.

        Raises:
            ValueError: it is not a line of this file.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or not {"step", "score"} <= values.keys():
            raise ValueError("not an object with step and score")
        return cls(int(values["step"]), Prediction.from_json(text), float(values["score"]))


class AnswerLog:
    """The file of a run's answers, used by a single process.

    Args:
        folder: Folder of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE_NAME

    def start_over(self) -> None:
        """Remove the file of an earlier run. A run that resumes must not call this."""
        self._file.unlink(missing_ok=True)

    def take_up(self, step: int) -> None:
        """Keep the answers up to a step, for a run that resumes from there."""
        if self._file.exists():
            kept = [one.to_json() for one in self._lines() if one.step <= step]
            with replacing(self._file) as path:
                _write(path, kept, "w")

    def add(self, step: int, lines: Sequence[Prediction]) -> None:
        """Add the answers of an evaluation. A write error is logged and does not stop the run.

        Args:
            step: Optimizer steps before the evaluation.
            lines: Samples with their answers.
        """
        pairs = (pair for scores in evaluate(lines) for pair in zip(scores.lines, scores.scored, strict=True))
        answered = [Answered(step, line, one.value) for line, one in pairs]
        try:
            _write(self._file, [one.to_json() for one in answered], "a")
        except OSError as error:
            logger.warning("Cannot write the answers of step %d to %s: %s.", step, self._file, error.strerror or error)

    def read(self) -> list[Answered]:
        """Return all answers in the order of the steps, one for each step and sample."""
        found = (
            {(one.step, one.line.index, one.line.member): one for one in self._lines()} if self._file.exists() else {}
        )
        return sorted(found.values(), key=lambda one: one.step)

    def _lines(self) -> Iterator[Answered]:
        """Yield the readable lines: the last line of a killed run may be cut off."""
        with self._file.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    yield Answered.from_json(text)
                except (ValueError, TypeError) as error:
                    logger.warning("Skipping %s:%d, which cannot be read: %s.", self._file, number, error)


def _write(path: Path, lines: Sequence[str], mode: str) -> None:
    # a lone surrogate cannot be encoded as UTF-8; its backslash escape is valid JSON
    with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(lines)
