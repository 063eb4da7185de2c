"""Whether the answers depend on the pictures: partners, and what is said of known answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from qwenvl.evaluate.image_ablation import ImageAblation, compare_views
from qwenvl.inference.other_images import VIEWS, View, blank, find_partners, fitted, key_of
from qwenvl.metrics.base import mean
from qwenvl.metrics.bootstrap import difference_interval, score_interval
from qwenvl.metrics.predictions import Prediction
from qwenvl.metrics.registry import METRICS

COUNT = 200


def line(index: int, *media: str, dataset: str = "d", kind: str = "image", **fields: object) -> Prediction:
    shown = tuple((kind, name) for name in media)
    return Prediction(index, dataset, "f", index + 1, media=shown, **fields)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 3))
def test_nobody_gets_its_own_picture(pictures: list[int], seed: int) -> None:
    lines = [line(index, str(picture)) for index, picture in enumerate(pictures)]
    partners = find_partners(lines, seed)
    assert partners == find_partners(lines, seed)
    by_key = {key_of(one): one for one in lines}
    for key, other in partners.items():
        assert by_key[key].media != by_key[other].media
    if len(set(pictures)) > 1:
        assert len(partners) == len(lines)
    if max(map(pictures.count, pictures)) * 2 <= len(pictures):
        assert len(set(partners.values())) == len(lines)  # a derangement: each picture is used once


def test_partners_are_of_the_same_dataset_and_kind_where_they_can_be() -> None:
    pictures = [line(n, f"{n}.png", dataset="ab"[n % 2]) for n in range(6)]
    clips = [line(6 + n, f"{n}.mp4", kind="video", dataset="a") for n in range(2)]
    alone = line(8, "alone.png", dataset="c")
    shares = line(9, "0.png", "9.png", dataset="e")
    rest = [line(10), replace(line(11, "bad.png"), error="missing_file: it is not there")]
    lines = [*pictures, *clips, alone, shares, *rest]
    by_key = {key_of(one): one for one in lines}
    found = {one.index: by_key[other] for one in lines if (other := find_partners(lines).get(key_of(one)))}
    assert set(found) == set(range(10))
    assert all(found[one.index].dataset == one.dataset for one in (*pictures, *clips))
    assert found[8].media[0][0] == "image" and found[6].index == 7
    assert not set(found[9].media) & set(shares.media)
    assert find_partners([alone]) == {}


def test_other_pictures_take_the_shape_of_those_they_stand_for() -> None:
    frames = torch.randint(0, 256, (5, 32, 64, 3), dtype=torch.uint8)
    like = torch.zeros(3, 64, 32, 3, dtype=torch.uint8)
    assert fitted(frames, like).shape == like.shape
    assert torch.equal(fitted(frames, frames), frames)
    still = torch.full((1, 8, 8, 3), 7, dtype=torch.uint8)
    assert torch.equal(fitted(still, like), torch.full_like(like, 7))
    assert torch.equal(fitted(frames, frames[:3]), frames[[0, 2, 4]])
    assert blank(frames).shape == frames.shape and blank(frames).unique().tolist() == [128]


def views(right: dict[View, float], loss: dict[View, float], count: int = COUNT) -> dict[View, list[Prediction]]:
    """Answers of which a known share is right, and losses of two tokens each, all with a little noise."""
    noise = np.random.default_rng(0).normal(0, 0.5, count)
    return {
        view: [
            line(
                n,
                f"{n}.png",
                expected="7",
                prediction="7" if (n * 37 % count) < right[view] * count else "8",
                loss=2 * loss[view] + abs(noise[n]),
                trained_tokens=2,
            )
            for n in range(count)
        ]
        for view in VIEWS
    }


def compared(right: tuple[float, float, float], loss: tuple[float, float, float], count: int = COUNT) -> ImageAblation:
    known = views(dict(zip(VIEWS, right, strict=True)), dict(zip(VIEWS, loss, strict=True)), count)
    return compare_views("digits", METRICS["exact_match"], known)


def test_a_model_that_looks_is_found() -> None:
    found = compared((0.98, 0.1, 0.11), (0.05, 2.0, 2.5))
    assert found.verdict.startswith("The answers depend on the image: exact match is 98.0% with its own image, 11.0%")
    assert "(difference 87.0 points, 95% CI 8" in found.verdict and "10.0% with a blank one" in found.verdict
    fall = found.score_falls["swapped"]
    assert fall.value == pytest.approx(0.87)
    # of a mean of values -1, 0 and 1, the normal approximation is good at 200 samples
    width = norm.ppf(0.975) * np.sqrt(0.87 * 0.13 / COUNT)
    assert (fall.low, fall.high) == (pytest.approx(0.87 - width, abs=0.01), pytest.approx(0.87 + width, abs=0.01))
    assert found.loss_rises["swapped"].value == pytest.approx(2.45)
    assert found.as_dict()["verdict"] == found.verdict


def test_a_blind_model_is_found_blind() -> None:
    found = compared((0.12, 0.11, 0.11), (2.0, 2.0, 2.0))
    assert found.verdict.startswith("No evidence that the answers depend on the image: exact match is 12.0%")
    assert not found.loss_rises["swapped"].excludes_zero


def test_a_loss_that_rises_shows_what_scores_do_not() -> None:
    assert "do not improve with the image, but the loss does" in compared((0.0, 0.0, 0.0), (1.9, 2.0, 2.0)).verdict


def test_worse_with_its_own_picture_is_said() -> None:
    assert "for the worse" in compared((0.1, 0.5, 0.6), (2.0, 2.0, 2.0)).verdict


def test_samples_that_are_not_in_every_view_are_left_out_and_counted() -> None:
    known = views(dict.fromkeys(VIEWS, 0.5), dict.fromkeys(VIEWS, 1.0), 10)
    known["swapped"][3] = replace(known["swapped"][3], error="no_partner: none")
    known["shown"][4] = replace(known["shown"][4], media=())
    found = compare_views("d", METRICS["exact_match"], known)
    assert (found.count, found.left_out) == (8, 2)
    nothing = compare_views("d", METRICS["exact_match"], {view: known[view][3:5] for view in VIEWS})
    assert (nothing.count, nothing.left_out) == (0, 2)
    assert nothing.verdict.startswith("Too few samples")


def test_differences_are_paired() -> None:
    """Two views that differ by the same on every sample differ for certain, however much the samples do."""
    rng = np.random.default_rng(1)
    one = rng.normal(0, 10, (50, 1))
    found = difference_interval(one + 0.1, one, mean)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    alone = score_interval(one, mean)
    assert alone.high - alone.low > 3


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    inside = [
        one.low <= 0.7 <= one.high
        for seed in range(200)
        for one in [score_interval((rng.random((60, 1)) < 0.7).astype(float), mean, seed)]
    ]
    assert 0.88 <= np.mean(inside) <= 0.99
