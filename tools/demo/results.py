"""The held-out samples of the demo and what a model answers to them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qwenvl.data.annotations import open_annotations
from qwenvl.data.types import DatasetSpec, ImageItem, VideoItem
from qwenvl.evaluate.generate import Answerer, generate, split_sample
from qwenvl.evaluate.scoring import guess_rate, is_right
from qwenvl.utilities.errors import UserError

SUFFIX = "_heldout.jsonl"
ORDER = ("digits", "comparisons", "grounding", "motion")
"""Tasks in the order in which they are shown; others follow."""

MAX_NEW_TOKENS = 64
"""More than the longest answer, a box as JSON."""


@dataclass(frozen=True)
class Result:
    """One held-out sample with the model's answer.

    Args:
        task: name of its annotation file, without :data:`SUFFIX`.
        media: its pictures or its video; absolute paths.
        question: text of the user's turn.
        expected: the answer that is right.
        answer: what the model wrote.
        right: whether that counts as right.
    """

    task: str
    media: tuple[str, ...]
    question: str
    expected: str
    answer: str
    right: bool


@dataclass(frozen=True)
class TaskScore:
    """How a task went.

    Args:
        task: its name.
        right: number of right answers.
        total: number of samples.
        chance: share of right answers of guesses that are answers to other samples.
    """

    task: str
    right: int
    total: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.total


def answer_heldout(answerer: Answerer, data: Path, *, limit: int | None = None, batch_size: int = 50) -> list[Result]:
    """Let the model answer the held-out samples of every task below a folder.

    Args:
        answerer: the model.
        data: folder with ``*_heldout.jsonl``.
        limit: most samples of a task; None for all.
        batch_size: samples answered at once.

    Raises:
        UserError: there is nothing to answer.
    """
    files = sorted(data.glob(f"*{SUFFIX}"), key=lambda file: _place(file.name.removesuffix(SUFFIX)))
    results = [result for file in files for result in _answer_file(answerer, file, limit, batch_size)]
    if not results:
        raise UserError(
            f"{data} holds no held-out samples (*{SUFFIX}). Make them: tools/make_demo_data.py --output DIR"
        )
    return results


def _place(task: str) -> tuple[int, str]:
    return ORDER.index(task) if task in ORDER else len(ORDER), task


def _answer_file(answerer: Answerer, file: Path, limit: int | None, batch_size: int) -> list[Result]:
    task = file.name.removesuffix(SUFFIX)
    table = open_annotations(DatasetSpec(task, (str(file),), str(file.parent)))
    rows = range(len(table) if limit is None else min(limit, len(table)))
    samples = [split_sample(sample) for row in rows for sample in table[row]]
    prompts = [prompt for prompt, _ in samples]
    answers = generate(answerer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size)
    results = []
    for (prompt, expected), answer in zip(samples, answers, strict=True):
        parts = [part for message in prompt.messages for part in message.parts]
        media = tuple(str(file.parent / str(part.source)) for part in parts if isinstance(part, ImageItem | VideoItem))
        question = " ".join(message.text for message in prompt.messages)
        results.append(Result(task, media, question, expected, answer, is_right(answer, expected)))
    return results


def score(results: Iterable[Result]) -> list[TaskScore]:
    """Return the score of every task, in the order in which tasks come."""
    tasks: dict[str, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    return [
        TaskScore(task, sum(one.right for one in group), len(group), guess_rate([one.expected for one in group]))
        for task, group in tasks.items()
    ]


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write one JSON line a sample."""
    lines = [json.dumps(asdict(result), ensure_ascii=False) + "\n" for result in results]
    path.write_text("".join(lines), encoding="utf-8")
