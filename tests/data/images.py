"""Pictures for the tests of media, and the calls that read them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.types import ImageItem
from qwenvl.utils.errors import SampleError


def picture(width: int = 40, height: int = 20, mode: str = "RGB") -> Image.Image:
    """Draw a picture without symmetry: brighter to the right, greener to the bottom."""
    pixels = np.zeros((height, width, 4), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    pixels[..., 2] = 60
    pixels[..., 3] = np.linspace(255, 0, width, dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    return image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def reason_of(call: Callable[[], Any], category: str) -> str:
    with pytest.raises(SampleError) as caught:
        call()
    assert caught.value.category == category, str(caught.value)
    return caught.value.reason


def both(reader: MediaReader, source: str | bytes) -> list[Callable[[], Any]]:
    return [lambda: reader.image_size(ImageItem(source)), lambda: reader.read_image(ImageItem(source))]
