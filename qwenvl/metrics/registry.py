"""The metrics by name, and the choice of one that fits the expected answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qwenvl.metrics.base import Case, Metric, Scored
from qwenvl.metrics.boxes import BOX_ACCURACY, BOX_IOU, read_boxes
from qwenvl.metrics.captions import BLEU, CHRF
from qwenvl.metrics.choice import CHOICE, is_choice, read_options
from qwenvl.metrics.json import JSON_EQUAL, JSON_VALID, read_json
from qwenvl.metrics.predictions import Prediction
from qwenvl.metrics.text import ANLS, EXACT, RELAXED, final_answer
from qwenvl.utils.errors import UserError, nearest

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (EXACT, RELAXED, ANLS, CHOICE, BOX_ACCURACY, BOX_IOU, JSON_EQUAL, JSON_VALID, BLEU, CHRF)
}
LONG_ANSWER = 12
"""Median words of a dataset's answers from which they count as texts."""


def find_metric(name: str) -> Metric:
    """Return a metric by its name.

    Raises:
        UserError: there is none.
    """
    if name not in METRICS:
        raise UserError(f"metric {name!r} is not one of {', '.join(METRICS)}.{nearest(name, METRICS)}")
    return METRICS[name]


def choose_metric(cases: Sequence[Case]) -> Metric:
    """Return the metric that fits the expected answers of a dataset: the first of these rules that holds for all.

    Boxes: ``box_accuracy``. Letters, to questions with options: ``multiple_choice``. JSON objects and arrays:
    ``json_equal``. Texts with a median of a dozen words or more: ``chrf``. Else: ``exact_match``. The other metrics
    are used only where they are named.
    """
    expected = [case.expected[0] for case in cases]
    if not cases:
        return EXACT
    if all(map(read_boxes, expected)):
        return BOX_ACCURACY
    if all(is_choice(case.expected[0]) and read_options(case.question) for case in cases):
        return CHOICE
    if all(isinstance(read_json(text)[1], dict | list) for text in expected):
        return JSON_EQUAL
    return CHRF if statistics.median(len(text.split()) for text in expected) >= LONG_ANSWER else EXACT


def to_case(line: Prediction) -> Case:
    """Return the case of a line for metrics: the answers without their thoughts."""
    accepted = tuple(map(final_answer, (line.expected, *line.accepted)))
    return Case(line.question, accepted, "" if line.thought else final_answer(line.prediction or ""))


def score_lines(lines: Sequence[Prediction], metric: Metric) -> list[Scored]:
    """Return the score of each line. Lines with an error have to be handled by the caller."""
    return [metric.score(to_case(line)) for line in lines]


__all__ = ["METRICS", "choose_metric", "find_metric", "score_lines", "to_case"]
