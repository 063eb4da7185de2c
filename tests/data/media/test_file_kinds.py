"""Files that are no image or video: each is named by its content, with what to do."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from qwenvl.data.media.images import image_size, read_image, read_pixels
from qwenvl.data.media.video.files import opened_video
from tests.data.images import encoded, picture, reason_of


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.jpg", b"0")
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


FILES = {
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400), "a HEIC (HEIF) photo", "heif-convert"),
    "PDF": (encoded(picture(), "PDF"), "a PDF document", "pdftoppm"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer", "git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html>404</html>", "an HTML page", "error message of a server"),
    "HTML without a type": (b"<HTML><head></head></HTML>", "an HTML page", "Download the file again"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "an SVG drawing", "Render it to PNG"),
    "SVG with a prologue": (b'<?xml version="1.0"?>\n<svg></svg>', "an SVG drawing", "Render it to PNG"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document", "Download"),
    "JSON": (b'\xef\xbb\xbf{"error": "not found"}', "JSON text", "error message of a server"),
    "zip": (archive(), "a zip archive", "Unpack it"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "an archive", "Unpack it"),
    "tar": (b"a.jpg".ljust(257, b"\0") + b"ustar\0", "a tar archive", "Unpack it"),
    "DICOM": (bytes(128) + b"DICM" + bytes(20), "a DICOM file", "Apply its window"),
    "NumPy": (array(), "an array of numbers", "Save it as PNG"),
    "JPEG XL": (b"\xff\x0a" + bytes(200), "a JPEG XL image", "Convert it to PNG"),
    "sound": (b"ID3\x03" + bytes(40), "a sound file", "images and videos"),
    "wave": (b"RIFF\x24\0\0\0WAVEfmt ", "a sound file", "images and videos"),
    "zeros": (bytes(5000), "a file of zeros", "Download it again"),
    "playlist": (b"#EXTM3U\nhttp://host/a.ts\n", "a playlist", "holds its video itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_named_whatever_it_should_be(name: str) -> None:
    content, what, remedy = FILES[name]
    for read in (image_size, read_image, read_pixels):
        reason = reason_of(lambda read=read: read(content), "wrong_type")
        assert f"it holds {what}" in reason and "not an image that can be read." in reason and remedy in reason
    reason = reason_of(lambda: opened_video(content).__enter__(), "wrong_type")
    assert f"it holds {what}" in reason and "not a video that can be read." in reason and remedy in reason


@pytest.mark.parametrize(
    "content", [b"\0\0\0\x18ftypisom" + bytes(9), b"\x1a\x45\xdf\xa3" + bytes(9), b"RIFF\0\0\0\0AVI "]
)
def test_a_video_given_as_an_image_is_named(content: bytes) -> None:
    reason = reason_of(lambda: image_size(content), "wrong_type")
    assert reason == "it holds a video, not an image. Give it as `video`, with its tag."


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF"])
def test_an_image_given_as_a_video_is_named(kind: str) -> None:
    reason = reason_of(lambda: opened_video(encoded(picture(), kind)).__enter__(), "wrong_type")
    assert reason == "it holds an image, not a video. Give it as `image`, with its tag."


def test_an_icon_is_named() -> None:
    reason = reason_of(lambda: image_size(encoded(picture(), "ICO")), "wrong_type")
    assert reason == "it holds an icon, not an image that can be read. Convert it to PNG."


def test_an_avif_image_is_no_video() -> None:
    content = encoded(picture(), "AVIF")
    assert image_size(content) == (20, 40)
    assert "it holds an AVIF image" in reason_of(lambda: opened_video(content).__enter__(), "wrong_type")


def test_of_an_unknown_file_the_start_is_shown_and_what_is_read() -> None:
    reason = reason_of(lambda: image_size(encoded(picture(), "TGA")), "wrong_type")
    assert "it starts with b'\\x00\\x00\\x02" in reason and "Convert it: JPEG, PNG, WebP," in reason
    reason = reason_of(lambda: image_size(b"404: the file was not found on this host, sorry" + bytes(9)), "wrong_type")
    assert "starts with b'404: the file wa'" in reason
    reason = reason_of(lambda: image_size(b"Access denied to the file of that name"), "wrong_type")
    assert "it starts with b'Access denied to the file of that name'" in reason
