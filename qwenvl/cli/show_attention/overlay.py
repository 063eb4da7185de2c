"""Attention maps and masks drawn over images."""

from __future__ import annotations

import numpy as np
from PIL import Image

_COLOURS = np.array([(20, 24, 82), (120, 28, 109), (237, 105, 37), (252, 255, 164)], dtype=np.float64)
"""From low to high: dark blue, purple, orange, pale yellow; readable without colour vision too."""

_MASK = np.array((208, 28, 139), dtype=np.float64)
_OUTLINE = np.array((20, 150, 70), dtype=np.uint8)


def combine(maps: np.ndarray) -> np.ndarray:
    """Return the mean of maps, each divided by its sum first, so that all maps have equal weight.

    Args:
        maps: float [n, height, width], values of 0 or more.

    Returns:
        float [height, width], which adds up to 1.
    """
    shares: np.ndarray = (maps / np.maximum(maps.sum((-2, -1), keepdims=True), 1e-12)).mean(0)
    return shares


def heat(image: Image.Image, shares: np.ndarray) -> Image.Image:
    """Draw a map over an image: brighter for higher values, interpolated linearly between cells.

    Args:
        image: Image of any size.
        shares: float [height, width], a grid over the whole image.
    """
    scaled = (shares - shares.min()) / max(float(np.ptp(shares)), 1e-12)
    fine = Image.fromarray(scaled.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    place = np.clip(np.asarray(fine, dtype=np.float64), 0, 1)
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(place, steps, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    strength = (0.35 + 0.4 * place)[..., None]
    return _mixed(image, colours, strength)


def masked(image: Image.Image, found: np.ndarray | None, expected: np.ndarray | None) -> Image.Image:
    """Draw a predicted mask over an image in pink, and the border of an annotated one in green.

    Args:
        image: Image of the same size as the masks.
        found: Predicted mask, bool [height, width]; None without one.
        expected: Annotated mask, bool [height, width]; None without one.
    """
    strength = np.zeros((image.height, image.width, 1)) if found is None else 0.55 * found[..., None]
    drawn = np.array(_mixed(image, _MASK, strength))
    if expected is not None:
        drawn[_border(expected, max(1, max(expected.shape) // 100))] = _OUTLINE
    return Image.fromarray(drawn)


def _mixed(image: Image.Image, colours: np.ndarray, strength: np.ndarray) -> Image.Image:
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    return Image.fromarray((pixels * (1 - strength) + colours * strength).round().astype(np.uint8))


def _border(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels of a mask that are at most ``width`` pixels from its outside."""
    inner = np.pad(mask, width)
    for _ in range(width):
        core = inner.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                core &= np.roll(inner, step, axis)
        inner = core
    border: np.ndarray = mask & ~inner[width:-width, width:-width]
    return border
