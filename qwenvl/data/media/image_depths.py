"""Scale gray images of more than eight bits per value to eight, as the checkpoints' processors do, or refuse them.

Pillow's own conversion to RGB does not scale them: it clips 16-bit values at 255, which makes nearly every one white.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from qwenvl.utils.errors import SampleError

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_UNSCALED = {"I": "whole numbers of 32 bits or with a sign (mode I)", "F": "floating-point numbers (mode F)"}
_CURE = "Scale its values to 0 to 255 yourself, and save it as an 8-bit PNG."
_LEAST_LEVELS = 16  # of 256: an image of 12 or fewer bits that is stored in 16 bits unscaled has no more levels


def refuse_unscaled(image: Image.Image) -> None:
    """Raise a SampleError (``wrong_type``) for an image whose values do not say which of them is black or white."""
    if image.mode in _UNSCALED and not _is_deep(image):
        reason = f"the values of the image are {_UNSCALED[image.mode]}, without a range from black to white."
        raise SampleError("wrong_type", f"{reason} {_CURE}")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return a gray image of 16 bits (or 12, in a TIFF) with 8 bits per value; any other image as it is.

    The values are scaled and rounded as by ``torchcodec.decoders.decode_image``, with which transformers reads a PNG:
    65535 becomes 255, and 257 becomes 1. A value that the file declares transparent becomes white.

    Raises:
        SampleError: ``wrong_type``: the values fill so little of their range that the image would be black.
    """
    if not _is_deep(image):
        return image
    values = np.asarray(image).astype(np.uint32)
    largest = 2 ** _bits(image) - 1
    if _tiff_tag(image, PHOTOMETRIC_INTERPRETATION) == 0:
        values = largest - values  # white is zero
    scaled = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    if values.max(initial=0) > 0 and scaled.max(initial=0) < _LEAST_LEVELS:
        raise SampleError(
            "wrong_type",
            f"the image has {_bits(image)} bits per value, but none above {values.max()} of {largest}: the "
            f"model would see it black. {_CURE}",
        )
    if (transparent := image.info.get("transparency")) is not None:
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image is gray with 16 bits; Pillow gives those of PGM files the mode of 32 bits."""
    return image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _bits(image: Image.Image) -> int:
    (bits,) = _tiff_tag(image, BITSPERSAMPLE) or (16,)
    return int(bits)


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    """Return the value of a tag of a TIFF; None where it has none, and of other formats."""
    return image.tag_v2.get(tag) if isinstance(image, TiffImageFile) else None
