"""Masks as COCO writes them, held against pycocotools; and the grids that they become."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pycocotools import mask as coco

from qwenvl.tasks.grounding.masks import Mask, mask_of, read_mask, shares
from qwenvl.utils.errors import SampleError


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    """Masks with at least one pixel, in blocks, so that runs of all lengths come."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    seed, block = draw(st.integers(0, 999)), draw(st.integers(1, 30))
    generator = np.random.default_rng(seed)
    coarse = generator.random((height // block + 1, width // block + 1)) < draw(st.floats(0.05, 0.95))
    pixels = coarse.repeat(block, 0).repeat(block, 1)[:height, :width]
    pixels[generator.integers(height), generator.integers(width)] = True
    return pixels


@given(pictures())
def test_run_lengths_are_those_of_pycocotools(pixels: np.ndarray) -> None:
    written = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    size = (pixels.shape[0], pixels.shape[1])
    compressed = read_mask({"size": list(size), "counts": written["counts"].decode()}, size)
    assert np.array_equal(compressed.pixels(), pixels)
    assert compressed.area == pixels.sum() == coco.area(written)
    counted = read_mask({"size": list(size), "counts": list(mask_of(pixels).runs)}, size)
    assert counted == compressed == mask_of(pixels)


@given(st.data())
def test_polygons_are_filled_as_pycocotools_fills_them(data: st.DataObject) -> None:
    size = (data.draw(st.integers(4, 80)), data.draw(st.integers(4, 80)))
    point = st.tuples(st.floats(-0.5, size[1] + 0.5), st.floats(-0.5, size[0] + 0.5))
    polygons = [
        [value for pair in corners for value in pair]
        for corners in data.draw(st.lists(st.lists(point, min_size=3, max_size=7), min_size=1, max_size=3))
    ]
    wanted = np.zeros(size, dtype=bool)
    for polygon in polygons:
        wanted |= coco.decode(coco.frPyObjects([polygon], *size))[..., 0].astype(bool)
    if wanted.any():
        assert np.array_equal(read_mask(polygons, size).pixels(), wanted)
    else:
        with pytest.raises(SampleError, match="no pixel inside"):
            read_mask(polygons, size)


@settings(max_examples=200)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_no_string_does_more_than_be_refused(counts: str, height: int, width: int) -> None:
    try:
        mask = read_mask({"size": [height, width], "counts": counts}, (height, width))
    except SampleError as error:
        assert error.category == "bad_mask"
    else:
        assert mask.pixels().shape == (height, width)


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        (None, "its segmentation is None"),
        ([], "list of polygons"),
        ([[1, 2, 3, 4]], "a polygon of its segmentation is [1, 2, 3, 4]"),
        ([[1, 2, 3, 4, 5]], "a polygon"),
        ([[1, 2, 3, 4, 5, float("nan")]], "lies outside the image, which is shown 6 pixels wide and 4 high"),
        ([[1, 2, 3, 4, 9, 4]], "lies outside"),
        ([[1, 1, 1, 1, 1, 1]], "no pixel inside"),
        ({"size": [6, 4], "counts": [24]}, "the size [6, 4] ([height, width]), but the image is shown 4 pixels high"),
        ({"size": [4, 6], "counts": [24]}, "no pixel inside"),
        ({"size": [4, 6], "counts": [20, 3]}, "add up to 23 pixels, but the image has 24"),
        ({"size": [4, 6], "counts": [-1, 25]}, "not run lengths"),
        ({"size": [4, 6], "counts": "!"}, "not compressed run lengths"),
        ({"size": [4, 6], "counts": "X"}, "end inside a number"),
    ],
)
def test_masks_that_cannot_be_used(segmentation: Any, expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        read_mask(segmentation, (4, 6))
    assert expected in caught.value.reason


def test_polygons_without_pycocotools_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        read_mask([[0, 0, 3, 0, 3, 3]], (4, 6))
    assert read_mask({"size": [4, 6], "counts": [20, 4]}, (4, 6)) == Mask((4, 6), (20, 4))


@given(pictures(), st.integers(1, 12), st.integers(1, 12))
def test_a_cell_of_a_grid_holds_its_share_of_the_mask(pixels: np.ndarray, rows: int, columns: int) -> None:
    """The oracle cuts pixels into equal parts, so that cells hold whole parts."""
    height, width = (math.lcm(side, cells) for side, cells in zip(pixels.shape, (rows, columns), strict=True))
    parts = pixels.repeat(height // pixels.shape[0], 0).repeat(width // pixels.shape[1], 1)
    wanted = parts.reshape(rows, height // rows, columns, width // columns).mean((1, 3))
    found = shares(pixels, (rows, columns))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
