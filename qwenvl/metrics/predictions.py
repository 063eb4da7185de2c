"""Predictions on disk: one JSON line per sample, in a part file per process until they are joined in data order.

    NAME.jsonl                 all lines, once every sample has one
    NAME.jsonl.settings.json   settings that they were made with; lines of another model or other settings are refused
    NAME.jsonl.part-K          lines of process K; removed once NAME.jsonl is written

A killed process leaves complete lines and at most one half-written line, which is cut off at the next start.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qwenvl.utils.cache import replacing
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

EMBEDDED = "embedded:"
"""Prefix of the name of a medium that is embedded in the annotations."""


@dataclass(frozen=True)
class Prediction:
    """One line of a file of predictions.

    Args:
        index: Number of the row in the data, from 0; the members of a packed row share it.
        dataset: Registry name.
        file: Annotation file.
        line: Line number in the annotation file, from 1.
        id: The sample's own ``id``, where it has one.
        member: Number of the sample in a packed row, from 1; None in an ordinary row.
        members: Samples of the row.
        question: Text of the turn that is answered.
        media: Kind (``image`` or ``video``) and path or URL of each medium; :data:`EMBEDDED` and a hash for one that
            is embedded in the annotations.
        expected: The correct answer; with ``task``, the sample's label.
        accepted: Other correct answers: the sample's field ``answers``.
        prediction: Text that the model wrote; None with ``error``.
        error: Reason why the sample could not be asked.
        finish_reason: ``stop`` where the model ended its answer, ``length`` where ``--max_new_tokens`` cut it (the
            names that servers use); None where it is unknown.
        thought: ``unfinished`` where the model was cut while it was still thinking, so that there is no answer.
        metric: Name of the metric that the sample or its dataset asks for.
        canvas: (width, height) of the image in the units of its boxes, where boxes are expected.
        loss: Cross entropy of the trained tokens, summed, in nats; None where it was not computed.
        trained_tokens: Number of trained tokens. Where answers have weights, this and the loss are weighted sums.
        task: Task of the head that made the prediction; None for an answer in words.
        scores: Probabilities of classes by name, or scores of the images.
    """

    index: int
    dataset: str
    file: str
    line: int
    id: str | None = None
    member: int | None = None
    members: int = 1
    question: str = ""
    media: tuple[tuple[str, Any], ...] = ()
    expected: str = ""
    accepted: tuple[str, ...] = ()
    prediction: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    thought: str | None = None
    metric: str | None = None
    canvas: tuple[int, int] | None = None
    loss: float | None = None
    trained_tokens: float | None = None
    task: str | None = None
    scores: Any = None

    def to_json(self) -> str:
        """Return the line with its newline; optional fields with default values are left out."""
        needed = ("index", "dataset", "file", "line", "id", "question", "expected", "prediction")
        values = {key: value for key, value in asdict(self).items() if key in needed or value not in (None, (), 1)}
        return json.dumps(values, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Prediction:
        """Read a line; unknown fields are ignored.

        Raises:
            ValueError: it is not a line of predictions.
        """
        values = json.loads(line)
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"question", "expected", "prediction"} <= values.keys():
            raise ValueError("not an object with question, expected and prediction")
        values = {key: value for key, value in values.items() if key in known}
        values |= {"media": tuple((kind, _hashable(source)) for kind, source in values.get("media", ()))}
        values |= {"accepted": tuple(values.get("accepted", ())), "canvas": _hashable(values.get("canvas"))}
        return cls(**{"index": 0, "dataset": "", "file": "", "line": 0, **values})


def _hashable(source: Any) -> Any:
    return tuple(source) if isinstance(source, list) else source


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file of predictions.

    Raises:
        UserError: it is missing, empty, or a line cannot be read.
    """
    try:
        found = list(_read(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. tools/predict.py --output writes it.") from error
    if not found:
        raise UserError(f"{path} holds no predictions.")
    return found


def _read(path: Path) -> Iterator[Prediction]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Prediction.from_json(line)
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}:{number} is no prediction ({error}). Each line is an object with question, expected and "
                    "prediction, as tools/predict.py --output writes it."
                ) from error


class PredictionStore:
    """The files of one output, which several processes write.

    Args:
        output: File that all lines are joined into.
        settings: Settings that the answers depend on, as JSON values.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = output
        self._settings = json.loads(json.dumps(settings))
        self._sidecar = output.with_name(output.name + ".settings.json")

    def begin(self) -> set[int]:
        """Check existing files and return the rows that are answered. Process 0 calls it before any process writes.

        Raises:
            UserError: existing lines were made with other settings, or the folder cannot be written.
        """
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._require_same_settings()
            for part in self._parts():
                _cut_half_line(part)
        except OSError as error:
            raise UserError(f"--output {self.output} cannot be written: {error.strerror}.") from error
        lines = {(one.index, one.member): one.members for one in self._lines()}
        counts = Counter(index for index, _ in lines)
        return {index for (index, _), members in lines.items() if counts[index] == members}

    def _require_same_settings(self) -> None:
        if self._sidecar.is_file():
            there = json.loads(self._sidecar.read_text(encoding="utf-8"))
            keys = sorted({*there, *self._settings})
            other = [key for key in keys if there.get(key) != self._settings.get(key)]
            if other:
                told = "; ".join(f"{key}: {there.get(key)} then, {self._settings.get(key)} now" for key in other)
                raise UserError(
                    f"{self.output} was begun with other settings ({told}). Use the same ones to go on, choose "
                    f"another --output, or remove {self.output.name}* to start anew."
                )
        elif self.output.exists() or self._parts():
            raise UserError(
                f"{self.output} exists and nothing says what it was made with ({self._sidecar.name} is missing). "
                "Choose another --output, or remove it."
            )
        else:
            with replacing(self._sidecar) as path:
                path.write_text(json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def writer(self, rank: int) -> Callable[[Iterable[Prediction]], None]:
        """Return a function that appends lines to the part file of a process and closes it after each call."""
        path = self.output.with_name(f"{self.output.name}.part-{rank}")

        def write(lines: Iterable[Prediction]) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(line.to_json() for line in lines))

        return write

    def join(self) -> list[Prediction]:
        """Put all lines into the output in the order of the data, remove the parts, and return the lines."""
        lines = {(one.index, one.member): one for one in self._lines()}
        ordered = [lines[key] for key in sorted(lines, key=lambda key: (key[0], key[1] or 0))]
        parts = self._parts()
        if parts or not self.output.exists():
            with replacing(self.output) as path:
                path.write_text("".join(line.to_json() for line in ordered), encoding="utf-8")
        for part in parts:
            part.unlink()
        return ordered

    def _lines(self) -> Iterator[Prediction]:
        for path in ([self.output] if self.output.exists() else []) + self._parts():
            yield from _read(path)

    def _parts(self) -> list[Path]:
        name = self.output.name + ".part-"
        return sorted(path for path in self.output.parent.glob("*") if path.name.startswith(name))


def _cut_half_line(path: Path) -> None:
    """Cut off what follows the last newline: a line that was being written when its process was killed."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s ends in half a line: that sample is answered anew.", path)
        os.truncate(path, whole)
