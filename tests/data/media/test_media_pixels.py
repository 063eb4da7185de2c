"""Pixels of pictures: whoever decodes them, they are Pillow's to the bit, and so is what is said of damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.types import ImageItem
from qwenvl.utils.errors import SampleError
from tests.data.images import encoded, picture, reason_of

ITEM = ImageItem("a")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    """JPEG files of every kind that Pillow writes, whole or damaged."""
    mode = draw(st.sampled_from(["RGB", "RGB", "RGB", "L", "CMYK"]))
    options: dict[str, Any] = {
        "quality": draw(st.integers(1, 100)),
        "subsampling": draw(st.integers(0, 2)),
        "progressive": draw(st.booleans()),
        "restart_marker_blocks": draw(st.integers(0, 5)),
    }
    if draw(st.booleans()):
        options["exif"] = turned(draw(st.integers(0, 9)))
    image = noise(draw(st.integers(1, 70)), draw(st.integers(1, 70)), mode, draw(st.integers(0, 99)))
    content = bytearray(encoded(image, "JPEG", **options))
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        content[draw(st.integers(2, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content), len(content), len(content) - 3, len(content) // 2]))])


def require_pixels_of_pillow(folder: Path, content: bytes) -> None:
    (folder / "a").write_bytes(content)
    reader = MediaReader(str(folder))
    try:
        expected = np.array(reader.read_image(ITEM))
    except SampleError as error:
        assert reason_of(lambda: reader.read_pixels(ITEM), error.category) == error.reason
    else:
        pixels = reader.read_pixels(ITEM)
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


@pytest.mark.filterwarnings("ignore:Tag data larger|Corrupt EXIF")
@settings(max_examples=200)
@given(content=jpegs())
def test_the_pixels_of_a_jpeg_are_those_of_pillow(tmp_path: Path, content: bytes) -> None:
    require_pixels_of_pillow(tmp_path, content)


@pytest.mark.parametrize("sampling", [0x11, 0x12, 0x21, 0x22, 0x41])
def test_however_its_colours_are_sampled(tmp_path: Path, sampling: int) -> None:
    """Colours of full, half or quarter height or width: what the header says of the blocks of a file, changed."""
    content = bytearray(encoded(noise(64, 64), "JPEG", subsampling=1))
    frame = content.index(b"\xff\xc0")
    assert content[frame + 11] == 0x21
    content[frame + 11] = sampling
    require_pixels_of_pillow(tmp_path, bytes(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_the_image(tmp_path: Path, kind: str, mode: str) -> None:
    (tmp_path / "a").write_bytes(encoded(picture(mode=mode), kind, exif=turned(6)))
    require_pixels_of_pillow(tmp_path, (tmp_path / "a").read_bytes())
    reader = MediaReader(str(tmp_path))
    pixels = reader.read_pixels(ITEM).permute(1, 2, 0)
    assert pixels.is_contiguous() and pixels.shape == (*reader.image_size(ITEM), 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": turned(1)}])
def test_plain_jpegs_do_not_wait_for_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (tmp_path / "a").write_bytes(encoded(picture(), "JPEG", **options))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("Pillow decodes"))
    assert MediaReader(str(tmp_path)).read_pixels(ITEM).shape == (3, 20, 40)


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_is_opened_once_where_it_is_to_be_kept(tmp_path: Path, keep: bool) -> None:
    (tmp_path / "a").write_bytes(encoded(picture(), "PNG"))
    reader = MediaReader(str(tmp_path), keep_images=keep)
    assert reader.image_size(ITEM) == (20, 40)
    (tmp_path / "a").unlink()
    if keep:
        assert reader.read_pixels(ITEM).shape == (3, 20, 40)
    else:
        reason_of(lambda: reader.read_pixels(ITEM), "missing_file")
