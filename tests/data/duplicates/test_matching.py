"""Pairs that share a key, and views of images, against the plain ways to get them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qwenvl.data.duplicates.image_hashes import FEATURES, SIDE, VIEWS, features_of_image, in_view
from qwenvl.data.duplicates.matching import clusters, pairs_by_key, similar_images, similar_texts

RNG = np.random.default_rng(0)


def as_set(found: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
    return sorted(pair for first, second in found for pair in zip(first.tolist(), second.tolist(), strict=True))


def test_pairs_of_equal_keys() -> None:
    keys = RNG.integers(0, 60, 200).astype(np.uint16)
    other = RNG.integers(0, 60, 200).astype(np.uint16)
    every = [(i, j) for j in range(200) for i in range(j)]
    assert as_set(list(pairs_by_key(keys))) == sorted((i, j) for i, j in every if keys[i] == keys[j])
    assert as_set(list(pairs_by_key(keys, other))) == sorted((i, j) for i, j in every if keys[i] == other[j])


def test_thousands_of_one_key_stay_joined() -> None:
    (pairs,) = pairs_by_key(np.zeros(5000, np.uint16))
    assert len(pairs[0]) < 5000 * 200
    assert len(set(clusters(5000, np.stack(pairs, axis=1)).tolist())) == 1


@pytest.mark.parametrize("view", range(1, len(VIEWS)))
def test_views_are_those_of_pillow(view: int) -> None:
    image = RNG.integers(0, 256, (16, 16), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).transpose(list(Image.Transpose)[view - 1]))
    assert np.array_equal(in_view(image[None], view)[0], expected)


def test_images_are_found_in_every_view() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    other = Image.fromarray(RNG.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    images = [image, *(image.transpose(one) for one in Image.Transpose), other]
    features = np.stack([features_of_image(key, one) for key, one in enumerate(images)])
    assert features.dtype == FEATURES
    pairs, views = similar_images(features)
    of_first = {
        second: view for (first, second), view in zip(pairs.tolist(), views.tolist(), strict=True) if first == 0
    }
    # the view that takes the second back: turning by 270 degrees undoes turning by 90
    assert of_first == {1: 1, 2: 2, 3: 5, 4: 4, 5: 3, 6: 6, 7: 7}
    assert len(set(clusters(len(images), pairs).tolist())) == 2


def test_groups_keep_texts_apart() -> None:
    texts, signatures = np.array([7, 7, 7], np.uint64), np.ones((3, 125), np.uint32)
    assert similar_texts(texts, signatures, np.array([1, 1, 2], np.uint64)).tolist() == [[0, 1]]
