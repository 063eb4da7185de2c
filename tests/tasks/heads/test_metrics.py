"""Metrics against scikit-learn and scipy, losses against their definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau
from sklearn import metrics as sklearn_metrics

from qwenvl.tasks.heads.confusion import confusion_svg
from qwenvl.tasks.heads.head import HeadSpec
from qwenvl.tasks.heads.losses import sample_losses
from qwenvl.tasks.heads.metrics import (
    average_precision,
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    ndcg,
    ranking_metrics,
    regression_metrics,
)
from qwenvl.tasks.heads.objective import HeadObjective, describe_scores

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
scores = st.lists(st.integers(-3, 3), min_size=2, max_size=12)  # whole numbers, so that some are equal


def spec(task: Any, **settings: Any) -> HeadSpec:
    names = ("a", "b", "c")
    return HeadSpec(task, 4, 3, "mean", classes=names if task in ("classification", "multilabel") else (), **settings)


@given(pairs)
def test_classification_equals_scikit_learn(both: list[tuple[int, int]]) -> None:
    predicted, expected = np.array(both).T
    found = classification_metrics(predicted, expected)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(expected, predicted))
    assert found["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(expected, predicted, average="macro", zero_division=0)
    )
    matrix = sklearn_metrics.confusion_matrix(expected, predicted, labels=range(4))
    assert (confusion_matrix(predicted, expected, 4) == matrix).all()


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=12), st.integers(0, 99))
def test_multilabel_equals_scikit_learn(rows: list[list[bool]], seed: int) -> None:
    expected = np.array(rows)
    likely = np.random.default_rng(seed).integers(0, 5, expected.shape) / 4  # some equal
    found = multilabel_metrics(likely, expected)
    chosen = likely >= 0.5
    for average in ("micro", "macro"):
        wanted = sklearn_metrics.f1_score(expected, chosen, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(wanted)
    present = np.flatnonzero(expected.any(0))
    for one in present:
        wanted = sklearn_metrics.average_precision_score(expected[:, one], likely[:, one])
        assert average_precision(likely[:, one], expected[:, one]) == pytest.approx(wanted)
    assert math.isnan(found["map"]) == (not len(present))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=20))
def test_regression_equals_scikit_learn(both: list[tuple[float, float]]) -> None:
    predicted, expected = np.array(both).T.round(3)
    found = regression_metrics(predicted[:, None], expected[:, None])
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(expected, predicted))
    assert found["rmse"] == pytest.approx(math.sqrt(sklearn_metrics.mean_squared_error(expected, predicted)))
    if len(set(expected)) > 1:
        assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(expected, predicted), rel=1e-6, abs=1e-6)
    else:
        assert math.isnan(found["r2"])


@given(scores, st.integers(0, 99))
def test_ranking_equals_scikit_learn_and_scipy(values: list[int], seed: int) -> None:
    relevances = np.random.default_rng(seed).integers(0, 4, len(values)).astype(float)
    relevances[0] = relevances.max() + 1  # not all equal
    found = np.array(values, float)
    assert ndcg(found, relevances) == pytest.approx(sklearn_metrics.ndcg_score([relevances], [found]))
    metrics = ranking_metrics([found], [relevances])
    tau = kendalltau(found, relevances).statistic
    assert metrics["kendall_tau"] == pytest.approx(0 if math.isnan(tau) else tau)
    right = [
        1 if found[i] > found[j] else 0.5 if found[i] == found[j] else 0
        for i in range(len(found))
        for j in range(len(found))
        if relevances[i] > relevances[j]
    ]
    assert metrics["pairwise_accuracy"] == pytest.approx(sum(right) / len(right))


CASES: dict[str, tuple[HeadSpec, list[Any], int]] = {
    "cross_entropy": (spec("classification"), [0, 2, 1], 1),
    "focal": (spec("classification", loss="focal", class_weights=(1.0, 2.0, 0.5)), [0, 2, 1], 1),
    "bce": (spec("multilabel", loss="bce", class_weights=(1.0, 2.0, 0.5)), [(0,), (), (1, 2)], 1),
    "focal of labels": (spec("multilabel", loss="focal"), [(0,), (), (1, 2)], 1),
    "mse": (spec("regression", loss="mse", means=(1.0, 0, 0), deviations=(2.0, 1, 1)), [(1.0, 2, 3)] * 3, 1),
    "huber": (spec("regression", loss="huber", means=(1.0, 0, 0), deviations=(2.0, 1, 1)), [(9.0, 2, 3)] * 3, 1),
    "pairwise": (spec("ranking", loss="pairwise"), [(1.0, 0, 2), (0.0, 1), (3.0, 3, 0)], 0),
    "listnet": (spec("ranking", loss="listnet"), [(1.0, 0, 2), (0.0, 1), (3.0, 3, 0)], 0),
}


def by_hand(head: HeadSpec, row: np.ndarray, target: Any) -> float:
    """The loss of one sample, in plain Python."""
    weights = head.class_weights or (1.0,) * 3
    if head.task == "classification":
        p = math.exp(row[target]) / sum(math.exp(one) for one in row)
        factor = (1 - p) ** head.focal_gamma if head.loss == "focal" else 1
        return -weights[target] * factor * math.log(p)
    if head.task == "multilabel":
        total = 0.0
        for number, score in enumerate(row):
            p = 1 / (1 + math.exp(-score if number in target else score))
            factor = (1 - p) ** head.focal_gamma if head.loss == "focal" else 1
            total -= (weights[number] if number in target else 1) * factor * math.log(p)
        return total / 3
    if head.task == "regression":
        apart = [abs(s - (t - m) / d) for s, t, m, d in zip(row, target, head.means, head.deviations, strict=True)]
        if head.loss == "mse":
            return sum(one**2 for one in apart) / 3
        return sum(one**2 / 2 if one < 1 else one - 0.5 for one in apart) / 3
    if head.loss == "pairwise":
        n = range(len(target))
        losses = [math.log(1 + math.exp(row[j] - row[i])) for i in n for j in n if target[i] > target[j]]
        return sum(losses) / len(losses)
    total, relevance = (sum(math.exp(one) for one in values) for values in (row, target))
    return -sum(math.exp(t) / relevance * (s - math.log(total)) for s, t in zip(row, target, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_the_sum_of_those_of_its_samples(name: str) -> None:
    head, targets, per_sample = CASES[name]
    lengths = [1] * len(targets) if per_sample else [len(one) for one in targets]
    values = np.random.default_rng(0).normal(size=(sum(lengths), 3 if per_sample else 1))
    found = sample_losses(head, torch.tensor(values), targets).sum().item()
    rows = [part[0] if per_sample else part[:, 0] for part in np.split(values, np.cumsum(lengths)[:-1])]
    assert found == pytest.approx(sum(by_hand(head, *one) for one in zip(rows, targets, strict=True)), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_samples_has_a_loss_of_zero_that_is_connected(name: str) -> None:
    head = CASES[name][0]
    values = torch.zeros(0, 3 if CASES[name][2] else 1, requires_grad=True)
    batch = {"sample_targets": [], "vision_rows": torch.zeros(0, dtype=torch.long)}
    loss, output = HeadObjective(head).compute(lambda **_: SimpleNamespace(logits=values), batch)
    assert loss.item() == 0 and loss.requires_grad and output.unit_losses.shape == (0,)
    assert HeadObjective(head).records(SimpleNamespace(logits=values.detach()), {"sample_targets": []}) == []
    assert HeadObjective(head).metrics([]) == {}


def test_scores_are_said_in_the_words_of_the_task() -> None:
    said = describe_scores(spec("classification"), np.array([[0.0, 2.0, 0.0]]))
    assert said["label"] == "b" and sum(said["probabilities"].values()) == pytest.approx(1)
    said = describe_scores(spec("multilabel"), np.array([[1.0, -1.0, 3.0]]))
    assert said["label"] == ["a", "c"] and said["probabilities"]["a"] == pytest.approx(1 / (1 + math.exp(-1)))
    head = HeadSpec("regression", 4, 1, "mean", means=(5.0,), deviations=(2.0,))
    assert describe_scores(head, np.array([[1.5]])) == {"label": 8.0}
    said = describe_scores(HeadSpec("ranking", 4, 1, "mean"), np.array([[0.1], [0.5], [0.2]]))
    assert said["order"] == [1, 2, 0]


def test_the_picture_holds_every_count_and_escapes_names() -> None:
    picture = confusion_svg(np.array([[7, 0], [3, 41]]), ["<b>", "&"])
    assert ">7</text>" in picture and ">3</text>" in picture and ">41</text>" in picture and ">0</text>" not in picture
    assert "&lt;b&gt;" in picture and "<b>" not in picture
