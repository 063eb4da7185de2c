"""The statistics of the ranking: each kind of suspect is found among its like, and ordinary samples are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwenvl.evaluate.ranking import (
    BIN,
    Evidence,
    Losses,
    Ranked,
    Views,
    compare_times,
    group_like,
    rank_samples,
    robust_scores,
)

Change = Callable[[np.ndarray, np.ndarray], Any]


def evidence(change: Change | None = None, samples: int = 400, epochs: int = 5, seed: int = 0) -> Evidence:
    """Return the losses of samples that a model learns: they fall from 3 to near 0, inside of each epoch too.

    Args:
        change: Function of (losses [samples, epochs], position in the epochs [samples, epochs]) that changes losses.
        samples: Number of samples.
        epochs: Number of epochs.
        seed: Seed of the losses and of the order in each epoch.
    """
    rng = np.random.default_rng(seed)
    place = np.stack([rng.permutation(samples) for _ in range(epochs)], axis=1)
    step = place + np.arange(epochs) * samples
    loss = 3 * np.exp(-3 * step / samples) * rng.lognormal(0, 0.3, (samples, epochs))
    if change is not None:
        change(loss, place)
    number = np.repeat(np.arange(samples), epochs)
    keys = [("d", "f", line, None) for line in range(1, samples + 1)]
    return Evidence(keys, [None] * samples, np.full(samples, 3.0), Losses(number, step.ravel(), loss.ravel()))


def of_line(ranked: list[Ranked], line: int) -> Ranked:
    return next(one for one in ranked if one.key[2] == line)


def test_samples_with_wrong_labels_stand_first() -> None:
    """Their losses rise while the model learns, and fall at last, when it has them by heart."""

    def exchange(loss: np.ndarray, _: Any) -> None:
        loss[:12] = [3.0, 3.5, 3.0, 2.0, 0.05]

    ranked = rank_samples(evidence(exchange))
    assert {one.key[2] for one in ranked[:12]} == set(range(1, 13))
    assert all("far_above_like" in one.reasons for one in ranked[:12])
    assert sum("far_above_like" in one.reasons for one in ranked[12:]) < 8
    assert [one.score for one in ranked] == sorted((one.score for one in ranked), reverse=True)


def test_a_sample_is_not_blamed_for_standing_at_the_beginning() -> None:
    """The first samples of the run have losses of 3, the last ones of the first epoch of 0.15: all are ordinary."""
    data = evidence()
    assert data.losses is not None
    differences, _, learned = compare_times(data.losses, group_like(["d"] * 400, data.lengths))
    early = (data.losses.step < 40).nonzero()[0]
    assert data.losses.loss[early].mean() > 2 and abs(np.median(differences[early])) < 0.2
    assert learned.mean() > 0.9


def test_never_learned_and_forgotten_are_told_apart() -> None:
    def change(loss: np.ndarray, _: Any) -> None:
        loss[0] = 3.0
        loss[1, -1] = 3.0

    ranked = rank_samples(evidence(change))
    assert "never_learned" in of_line(ranked, 1).reasons and "forgotten" not in of_line(ranked, 1).reasons
    assert "forgotten" in of_line(ranked, 2).reasons and "never_learned" not in of_line(ranked, 2).reasons
    ordinary = [one for one in ranked if one.key[2] > 2]
    assert sum("never_learned" in one.reasons for one in ordinary) <= 4


def test_samples_are_compared_with_their_own_dataset_and_length() -> None:
    """Losses of one dataset are ten times those of the other, and long answers' half of short ones'."""
    datasets = ["a"] * 500 + ["b"] * 500
    lengths = np.array([10.0, 100.0] * 500)
    groups = group_like(datasets, lengths)
    assert len(set(groups.tolist())) == 4 and 2 * BIN <= 500
    values = np.where(np.array(datasets) == "a", 1.0, 10.0) / np.where(lengths > 50, 2, 1)
    values = values * np.random.default_rng(0).lognormal(0, 0.1, 1000)
    values[3] = 1.0  # a long answer of a
    assert robust_scores(values, groups).argmax() == 3


def test_a_group_of_equal_losses_has_no_outliers_by_rounding() -> None:
    values = np.full(100, 1.0)
    values[7] = 1.0001
    assert robust_scores(values, np.zeros(100, np.int64)).max() < 0.1
    assert np.isnan(robust_scores(np.array([np.nan, np.nan]), np.zeros(2, np.int64))).all()


def test_images_that_mislead_or_do_not_matter_are_named() -> None:
    rng, count = np.random.default_rng(0), 100
    shown = rng.uniform(0.05, 0.15, count)
    blank, swapped = shown + rng.uniform(0.9, 1.1, count), shown + rng.uniform(0.9, 1.1, count)
    shown[0], blank[0], swapped[0] = 3.0, 1.0, 1.2
    blank[1] = shown[1] + 0.01
    blank[2] = swapped[2] = np.nan  # a sample without an image
    keys = [("d", "f", line, None) for line in range(1, count + 1)]
    ranked = rank_samples(Evidence(keys, [None] * count, np.full(count, 5.0), None, Views(shown, blank, swapped)))
    assert ranked[0].key[2] == 1 and set(ranked[0].reasons) == {"far_above_like", "worse_with_image"}
    assert of_line(ranked, 2).reasons == ["same_without_image"]
    assert all(one.reasons == [] for one in ranked if one.key[2] > 2)
    line = ranked[0].as_dict()
    assert list(line)[:6] == ["dataset", "file", "line", "id", "score", "reasons"] and line["loss_blank"] == 1.0


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples_and_a_single_time_are_ranked(count: int) -> None:
    ranked = rank_samples(evidence(samples=count, epochs=1))
    assert len(ranked) == count and all(np.isfinite(one.score) for one in ranked)
