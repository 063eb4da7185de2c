"""Gray images of more than eight bits: the pixels of the stock processor, or a reason; never all white or black."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image_as_tensor

from qwenvl.data.media.images import image_size, read_image, read_pixels
from tests.data.images import encoded, reason_of

EVERY_VALUE = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def deep(values: np.ndarray = EVERY_VALUE, kind: str = "PNG", mode: str = "I;16", **options: Any) -> bytes:
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, values.shape[::-1], values.astype(order).tobytes())
    return encoded(image, kind, **options)


def gray_of(content: bytes) -> np.ndarray:
    """Read an image both ways, which have to agree and be gray; return one of its colours."""
    pixels = read_pixels(content)
    assert torch.equal(pixels, torch.from_numpy(np.array(read_image(content))).permute(2, 0, 1))
    assert image_size(content) == tuple(pixels.shape[1:])
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    return pixels[0].numpy()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(deep(), id="PNG"),
        pytest.param(deep(kind="TIFF"), id="TIFF"),
        pytest.param(deep(kind="TIFF", mode="I;16B"), id="TIFF, big-endian"),
        pytest.param(deep(65535 - EVERY_VALUE, "TIFF", tiffinfo={262: 0}), id="TIFF, white is zero"),
        pytest.param(deep(kind="JPEG2000"), id="JPEG2000"),
        pytest.param(deep(kind="PPM"), id="PGM"),
    ],
)
def test_every_value_of_16_bits_is_scaled_as_by_transformers(tmp_path: Path, content: bytes) -> None:
    """Transformers reads the PNG alone of these: all of them hold the same image."""
    (tmp_path / "a.png").write_bytes(deep())
    expected = load_image_as_tensor(str(tmp_path / "a.png"))
    assert expected.dtype == torch.uint8 and expected[0, 0, :3].tolist() == [0, 0, 0] and int(expected.max()) == 255
    assert np.array_equal(gray_of(content), expected[0].numpy())


def test_deep_images_are_turned_and_their_transparency_is_white() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    values = np.array([[0, 257, 65535], [2570, 25700, 128]], dtype=np.uint16)
    assert gray_of(deep(values, exif=exif)).tolist() == [[10, 0], [100, 1], [0, 255]]
    assert gray_of(deep(values, transparency=257)).tolist() == [[0, 255, 255], [10, 100, 0]]


def twelve_bits(values: list[int]) -> bytes:
    """Return a TIFF of one row that says it has 12 bits a value, two of them in three bytes."""
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    content = encoded(Image.new("L", (len(values), 1)), "TIFF", tiffinfo={258: 8})
    place = Image.open(io.BytesIO(content)).tag_v2[273][0]  # type: ignore[attr-defined]
    tags = bytearray(content[:place] + packed)
    for tag, value in ((258, 12), (279, len(packed))):
        at = next(n for n in range(10, place, 12) if int.from_bytes(tags[n : n + 2], "little") == tag)
        tags[at + 8 : at + 10] = value.to_bytes(2, "little")
    return bytes(tags)


def test_a_tiff_of_12_bits_is_scaled_from_12() -> None:
    assert gray_of(twelve_bits([0, 4095, 16, 2048])).tolist() == [[0, 255, 1, 128]]


@pytest.mark.parametrize(("largest", "refused"), [(0, False), (1, True), (4096 - 129, True), (4096, False)])
def test_values_that_fill_a_sixteenth_of_their_range_are_refused(largest: int, refused: bool) -> None:
    """As 12-bit data in a 16-bit file would be: nearly black, in 16 levels. An image that is black may be."""
    content = deep(np.array([[0, largest]], dtype=np.uint16))
    assert image_size(content) == (1, 2)
    if not refused:
        assert gray_of(content).tolist() == [[0, largest // 256]]
        return
    for read in (read_image, read_pixels):
        reason = reason_of(lambda read=read: read(content), "wrong_type")
        assert f"16 bits per value, but none above {largest} of 65535" in reason
        assert "Scale its values to 0 to 255" in reason


@pytest.mark.parametrize(
    ("values", "said"), [(np.int32, "32 bits or with a sign (mode I)"), (np.float32, "floating-point numbers (mode F)")]
)
def test_values_without_a_range_are_refused_by_their_header(values: type, said: str) -> None:
    content = encoded(Image.fromarray(np.ones((2, 3), dtype=values)), "TIFF")
    for call in (image_size, read_image, read_pixels):
        reason = reason_of(lambda call=call: call(content), "wrong_type")
        assert said in reason and "Scale its values to 0 to 255 yourself, and save it as an 8-bit PNG." in reason
