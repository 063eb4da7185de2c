"""Pictures as bytes and files: what is read of them before they are decoded, and which are too large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenvl.data.media.images import IMAGE_BYTES, image_size, read_file, read_image, read_pixels
from tests.data.images import encoded, picture, reason_of
from tests.data.media.test_reader import late_exif, xmp_in_text


def refuse_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow opens it"))


@pytest.mark.parametrize("as_file", [False, True])
def test_the_size_of_a_jpeg_is_known_without_pillow(
    tmp_path: Path, as_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(picture(), "JPEG")
    (tmp_path / "a").write_bytes(content)
    located = str(tmp_path / "a") if as_file else content
    refuse_pillow(monkeypatch)
    assert image_size(located) == (20, 40)
    assert tuple(read_pixels(located).shape) == (3, 20, 40)


@pytest.mark.parametrize("call", [image_size, read_pixels])
def test_a_jpeg_of_too_many_pixels_is_refused_by_its_header(
    call: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(picture(), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    assert "800 pixels, more than 799" in reason_of(lambda: call(content), "decompression_bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # how Pillow is told to take any
    call(content)


@pytest.mark.parametrize("content", [late_exif(), xmp_in_text()], ids=["behind the pixels", "XMP"])
def test_bytes_are_turned_as_files_are(content: bytes) -> None:
    assert image_size(content) == (40, 20)
    assert tuple(read_pixels(content).shape) == (3, 40, 20)
    assert read_image(content).size == (20, 40)


def test_files_larger_than_any_picture_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(IMAGE_BYTES + 1)
    for call in (image_size, read_image, read_pixels, read_file):
        reason = reason_of(lambda call=call: call(str(tmp_path / "a")), "decompression_bomb")
        assert f"the file has {IMAGE_BYTES + 1} bytes, more than an image may have (512 MiB)" in reason
    with open(tmp_path / "a", "wb") as file:
        file.truncate(IMAGE_BYTES)
    assert "a file of zeros" in reason_of(lambda: image_size(str(tmp_path / "a")), "wrong_type")


def test_a_file_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    for call in (image_size, read_image, read_pixels):
        reason_of(lambda call=call: call(str(tmp_path / "none")), "unreadable_file")
