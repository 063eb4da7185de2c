"""Masks of annotations: COCO's run lengths, compressed or not, and polygons; and resampling of masks to grids.

``segmentation`` has three forms, as in COCO's files (https://cocodataset.org/#format-data; pycocotools' ``mask.py``):

- polygons: a list of lists ``[x1, y1, x2, y2, ...]`` in pixels; the mask is their union;
- run lengths: ``{"size": [height, width], "counts": [n0, n1, ...]}``: column by column from the left, each from the
  top, n0 pixels outside the mask, then n1 inside, and so on;
- compressed run lengths: the same with ``counts`` as a string.

All are in pixels of the image as it is shown, after its EXIF orientation is applied.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qwenvl.utils.errors import SampleError, UserError

Size = tuple[int, int]

_FORMS = (
    "It has to be a list of polygons [[x1, y1, x2, y2, x3, y3, ...], ...] in pixels, or run lengths "
    '{"size": [height, width], "counts": ...}, as in COCO.'
)


@dataclass(frozen=True)
class Mask:
    """A mask of an image.

    Args:
        size: (height, width) of the image in pixels, as it is shown.
        runs: Run lengths in pixels, alternately outside and inside, starting outside; column by column. They add up to
            the image's number of pixels.
    """

    size: Size
    runs: tuple[int, ...]

    @cached_property
    def area(self) -> int:
        """Number of pixels inside."""
        return sum(self.runs[1::2])

    def pixels(self) -> np.ndarray:
        """Return the mask as bool [height, width]."""
        inside = np.arange(len(self.runs)) % 2 == 1
        return np.repeat(inside, self.runs).reshape(self.size[1], self.size[0]).T


def mask_of(pixels: np.ndarray) -> Mask:
    """Return the mask of the true pixels of an array: bool [height, width]."""
    flat = np.asarray(pixels, dtype=bool).T.reshape(-1)
    borders = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(borders, prepend=0, append=len(flat))
    return Mask((pixels.shape[0], pixels.shape[1]), tuple(runs.tolist()))


def read_mask(segmentation: Any, size: Size) -> Mask:
    """Read the ``segmentation`` of an annotation.

    Args:
        segmentation: Mask in one of the forms above.
        size: (height, width) of the image in pixels, as it is shown.

    Raises:
        SampleError: it has none of these forms, does not fit the image, or has no pixel inside (``bad_mask``).
        UserError: it consists of polygons, and pycocotools is not installed.
    """
    if isinstance(segmentation, Mapping):
        mask = _from_runs(segmentation, size)
    elif isinstance(segmentation, list) and segmentation:
        mask = _from_polygons(segmentation, size)
    else:
        raise _bad(f"its segmentation is {reprlib.repr(segmentation)}. {_FORMS}")
    if not mask.area:
        raise _bad("its segmentation has no pixel inside. Remove the mask or correct it.")
    return mask


def _bad(reason: str) -> SampleError:
    return SampleError("bad_mask", reason)


def _from_runs(segmentation: Mapping[Any, Any], size: Size) -> Mask:
    given, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(given, list) or given != list(size):
        raise _bad(
            f"its segmentation has the size {reprlib.repr(given)} ([height, width]), but the image is "
            f"shown {size[0]} pixels high and {size[1]} wide, after its EXIF orientation. Make the mask again, for the "
            "image as it is shown."
        )
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise _bad(f"the counts of its segmentation are {reprlib.repr(counts)}, not run lengths. {_FORMS}")
    if sum(counts) != size[0] * size[1]:
        raise _bad(
            f"the counts of its segmentation add up to {sum(counts)} pixels, but the image has {size[0] * size[1]}."
        )
    return Mask(size, tuple(counts))


def _uncompressed(counts: str) -> list[int]:
    """Decode COCO's string of run lengths: characters of 5 bits of a number, and a bit that says that more follow.

    From the fourth run on, a number is the difference to the run two before. (``rleFrString`` of COCO's maskApi.c is
    not used because it does not check bounds, which is unsafe for untrusted strings.)
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 35:
            raise _bad(f"the counts of its segmentation, {reprlib.repr(counts)}, are not compressed run lengths.")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # negative
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise _bad(f"the counts of its segmentation, {reprlib.repr(counts)}, end inside a number.")
    return runs


def _from_polygons(polygons: Sequence[Any], size: Size) -> Mask:
    for polygon in polygons:
        _check_polygon(polygon, size)
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise UserError("Masks drawn as polygons need a package that is missing: pip install pycocotools.") from error
    # one at a time: pycocotools would read a list whose first polygon has four numbers as boxes
    filled = coco.merge([coco.frPyObjects([polygon], *size)[0] for polygon in polygons])
    return Mask(size, tuple(_uncompressed(filled["counts"].decode("ascii"))))


def _check_polygon(polygon: Any, size: Size) -> None:
    """Raise an error for an invalid polygon, or one that lies a pixel or more outside the image."""
    numbers = isinstance(polygon, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in polygon
    )
    if not numbers or len(polygon) < 6 or len(polygon) % 2:
        raise _bad(f"a polygon of its segmentation is {reprlib.repr(polygon)}. {_FORMS}")
    axes = ((polygon[0::2], size[1]), (polygon[1::2], size[0]))
    if not all(-1 < value < side + 1 for values, side in axes for value in values):
        raise _bad(
            f"a polygon of its segmentation, {reprlib.repr(polygon)}, lies outside the image, which is shown "
            f"{size[1]} pixels wide and {size[0]} high, after its EXIF orientation. Coordinates are x, y in pixels of "
            "the image as it is shown."
        )


def shares(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Return the share of each cell of a grid that a mask covers.

    The grid spans the whole image. A cell may contain fractions of pixels: in a row of three pixels, the first of two
    cells contains the first pixel and half of the second.

    Args:
        pixels: Mask [height, width], 1 or true inside.
        size: (height, width) of the grid in cells, coarser or finer than the pixels.

    Returns:
        float32 of ``size``, 0 to 1.
    """
    down, across = (_overlaps(side, cells) for side, cells in zip(pixels.shape, size, strict=True))
    return (down @ pixels.astype(np.float64) @ across.T).astype(np.float32)


def _overlaps(side: int, cells: int) -> np.ndarray:
    """Return float64 [cells, side]: the share of each cell that each pixel covers; rows add up to 1."""
    borders = np.arange(cells + 1) * (side / cells)
    pixels = np.arange(side)
    stop = np.minimum(borders[1:, None], pixels + 1)
    start = np.maximum(borders[:-1, None], pixels)
    return np.clip(stop - start, 0, None) * (cells / side)
