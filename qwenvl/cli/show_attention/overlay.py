"""Maps and masks drawn over pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

_COLOURS = np.array([(20, 24, 82), (120, 28, 109), (237, 105, 37), (252, 255, 164)], dtype=np.float64)
"""From little to much: dark blue, purple, orange, pale yellow; readable without colour vision, too."""

_MASK = np.array((208, 28, 139), dtype=np.float64)
_OUTLINE = np.array((20, 150, 70), dtype=np.uint8)


def combine(maps: np.ndarray) -> np.ndarray:
    """Return one map of several: each divided by its sum first, so that it counts where it looks and not how much.

    Args:
        maps: [n, height, width], 0 or more.

    Returns:
        [height, width], which adds up to 1.
    """
    shares: np.ndarray = (maps / np.maximum(maps.sum((-2, -1), keepdims=True), 1e-12)).mean(0)
    return shares


def heat(picture: Image.Image, shares: np.ndarray) -> Image.Image:
    """Lay a map over a picture: the brighter, the more; between cells linearly.

    Args:
        picture: of any size.
        shares: [height, width] over the whole picture.
    """
    scaled = (shares - shares.min()) / max(float(np.ptp(shares)), 1e-12)
    fine = Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    place = np.clip(np.asarray(fine, dtype=np.float64), 0, 1)
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(place, steps, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    strength = (0.35 + 0.4 * place)[..., None]
    return _mixed(picture, colours, strength)


def masked(picture: Image.Image, found: np.ndarray | None, expected: np.ndarray | None) -> Image.Image:
    """Lay a mask over a picture in pink, and draw the border of an annotated one in green.

    Args:
        picture: of the masks' size.
        found: bool [height, width]; None for none.
        expected: the same.
    """
    strength = np.zeros((picture.height, picture.width, 1)) if found is None else 0.55 * found[..., None]
    drawn = np.array(_mixed(picture, _MASK, strength))
    if expected is not None:
        drawn[_border(expected, max(1, max(expected.shape) // 100))] = _OUTLINE
    return Image.fromarray(drawn)


def _mixed(picture: Image.Image, colours: np.ndarray, strength: np.ndarray) -> Image.Image:
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    return Image.fromarray((pixels * (1 - strength) + colours * strength).round().astype(np.uint8))


def _border(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels of a mask that are at most ``width`` away from its outside."""
    inner = np.pad(mask, width)
    for _ in range(width):
        core = inner.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                core &= np.roll(inner, step, axis)
        inner = core
    border: np.ndarray = mask & ~inner[width:-width, width:-width]
    return border
