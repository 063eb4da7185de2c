"""The held-out samples of the demo and the answers of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qwenvl.cli.inference_args import AskArguments, open_asking_encoder, open_model
from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec
from qwenvl.inference.answer_rows import Job, answer
from qwenvl.inference.generate import ChatModel
from qwenvl.metrics.base import Case
from qwenvl.metrics.predictions import Prediction
from qwenvl.metrics.registry import choose_metric, score_lines, to_case
from qwenvl.utils.errors import UserError

SUFFIX = "_heldout.jsonl"
ORDER = ("digits", "comparisons", "grounding", "motion")
"""Tasks in the order of the page; others follow."""

MAX_NEW_TOKENS = 64
"""More than the longest answer, a box as JSON."""


@dataclass(frozen=True)
class Result:
    """One held-out sample with the model's answer.

    Args:
        task: Name of the annotation file, without :data:`SUFFIX`.
        media: Absolute paths of the images or the video.
        question: Text of the user's turn.
        expected: Annotated answer.
        answer: Answer of the model.
        right: The answer counts as right.
    """

    task: str
    media: tuple[str, ...]
    question: str
    expected: str
    answer: str
    right: bool


@dataclass(frozen=True)
class TaskScore:
    """Score of a task.

    Args:
        task: Name of the task.
        right: Number of right answers.
        total: Number of samples.
        chance: Share of right answers, from 0 to 1, if each were the answer to another sample.
    """

    task: str
    right: int
    total: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.total


def answer_heldout(model: str, data: Path, *, limit: int | None = None, batch_size: int = 50) -> list[Result]:
    """Let a model answer the held-out samples of every task below a folder.

    Args:
        model: Folder of the model.
        data: Folder with ``*_heldout.jsonl``.
        limit: Most samples of a task; None for all.
        batch_size: Samples in a generation batch.

    Raises:
        UserError: The model cannot be opened, or there is nothing to answer.
    """
    files = sorted(data.glob(f"*{SUFFIX}"), key=lambda file: _place(file.name.removesuffix(SUFFIX)))
    if not files:
        raise UserError(
            f"{data} holds no held-out samples (*{SUFFIX}). Generate them: tools/make_demo_data.py --output DIR"
        )
    arguments = AskArguments(model_name_or_path=model, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size)
    encoder = open_asking_encoder(arguments)
    chat_model = open_model(arguments, encoder)
    return [result for file in files for result in _answer_file(arguments, encoder, chat_model, file, limit)]


def _place(task: str) -> tuple[int, str]:
    return ORDER.index(task) if task in ORDER else len(ORDER), task


def _answer_file(
    arguments: AskArguments, encoder: SampleEncoder, chat_model: ChatModel, file: Path, limit: int | None
) -> list[Result]:
    task = file.name.removesuffix(SUFFIX)
    table = open_annotations(DatasetSpec(task, (str(file),), str(file.parent)))
    rows = np.arange(len(table) if limit is None else min(limit, len(table)))
    job = Job(str(file), [SampledTable(table, rows)], encoder, arguments.decoding, arguments.batch_size)
    lines: list[Prediction] = []
    answer(job, rows.tolist(), chat_model, lines.extend)
    for line in lines:
        if line.error is not None:
            raise UserError(f"{line.file}:{line.line}: {line.error} Generate the data again: tools/make_demo_data.py")
    scored = score_lines(lines, choose_metric([to_case(line) for line in lines]))
    return [
        Result(
            task,
            tuple(str(source) for _, source in line.media),
            line.question,
            line.expected,
            line.prediction or "",
            one.value == 1,
        )
        for line, one in zip(lines, scored, strict=True)
    ]


def guess_rate(expected: Sequence[str]) -> float:
    """Return the chance level: the share of right answers if each were the answer to another sample of the task."""
    metric = choose_metric([Case("", (answer,), answer) for answer in expected])
    pairs = [(guess, answer) for i, guess in enumerate(expected) for j, answer in enumerate(expected) if i != j]
    return sum(metric.score(Case("", (want,), got)).value == 1 for got, want in pairs) / len(pairs) if pairs else 0.0


def score(results: Iterable[Result]) -> list[TaskScore]:
    """Return the score of every task, in the order of the results."""
    tasks: dict[str, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    return [
        TaskScore(task, sum(one.right for one in group), len(group), guess_rate([one.expected for one in group]))
        for task, group in tasks.items()
    ]


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write one JSON line per sample."""
    lines = [json.dumps(asdict(result), ensure_ascii=False) + "\n" for result in results]
    path.write_text("".join(lines), encoding="utf-8")
