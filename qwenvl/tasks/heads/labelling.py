"""Predict labels for rows of datasets with the head of a task, as a function for :mod:`qwenvl.inference.answer_rows`.

Also the metrics of predicted labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwenvl.inference.answer_rows import Job, Progress, open_row
from qwenvl.inference.prompts import label_text
from qwenvl.metrics.predictions import Prediction
from qwenvl.tasks.heads.metrics import (
    classification_metrics,
    multilabel_metrics,
    ranking_metrics,
    regression_metrics,
)
from qwenvl.tasks.heads.predict import TaskModel


def label(
    job: Job,
    indices: Sequence[int],
    model: TaskModel,
    write: Callable[[Iterable[Prediction]], None],
    told: Progress = lambda _: None,
) -> None:
    """Label rows batch by batch; the arguments are those of :func:`qwenvl.inference.answer_rows.answer`."""
    for start in range(0, len(indices), job.batch_size):
        chunk = indices[start : start + job.batch_size]
        lines = [line for index in chunk for line in open_row(job, index)]
        prompts = [example.prompt for _, example in lines if example is not None]
        found = iter(model.predict_prompts(prompts) if prompts else [])
        task = model.head.spec.task
        write([line if one is None else _labelled(line, task, next(found)) for line, one in lines])
        told(len(chunk))


def _labelled(line: Prediction, task: str, said: dict[str, Any]) -> Prediction:
    scores = said.get("probabilities", said.get("scores"))
    return replace(line, prediction=label_text(said["label"]), scores=scores, task=task)


def label_metrics(lines: Iterable[Prediction]) -> dict[str, float]:
    """Return the metrics of predicted labels, the same as in evaluation during training; empty without known labels.

    Args:
        lines: Predictions of one task.
    """
    known = [line for line in lines if line.task is not None and line.error is None and line.expected]
    if not known:
        return {}
    of_task = {"classification": _of_classes, "multilabel": _of_labels, "regression": _of_numbers, "ranking": _of_ranks}
    return of_task[str(known[0].task)](known)


def _of_classes(lines: Sequence[Prediction]) -> dict[str, float]:
    numbers = {name: number for number, name in enumerate(lines[0].scores)}
    pairs = [(numbers[line.prediction or ""], numbers[line.expected]) for line in lines]
    return classification_metrics(*np.array(pairs).T)


def _of_labels(lines: Sequence[Prediction]) -> dict[str, float]:
    classes = list(lines[0].scores)
    likely = np.array([[line.scores[name] for name in classes] for line in lines])
    expected = [set(map(str, json.loads(line.expected))) for line in lines]
    return multilabel_metrics(likely, np.array([[name in one for name in classes] for one in expected]))


def _of_numbers(lines: Sequence[Prediction]) -> dict[str, float]:
    predicted, expected = (
        np.array([np.atleast_1d(json.loads(text)) for text in texts], float)
        for texts in ([line.prediction or "" for line in lines], [line.expected for line in lines])
    )
    return regression_metrics(predicted, expected)


def _of_ranks(lines: Sequence[Prediction]) -> dict[str, float]:
    scores = [np.array(line.scores) for line in lines]
    return ranking_metrics(scores, [np.array(json.loads(line.expected), float) for line in lines])
