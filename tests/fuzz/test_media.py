"""Damaged, lying and disguised media: sizes and pixels that agree, or a reason that names the file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.video.backend import VideoBackend
from qwenvl.data.media.video.decode import PyAvBackend, TorchcodecBackend
from qwenvl.data.types import ImageItem, VideoItem
from qwenvl.utils.errors import SampleError
from tests.data.images import encoded, picture
from tests.fuzz.doors import LONGEST_MESSAGE
from tests.fuzz.fuzz import EFFORTS, damaged, fuzz


def images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
    frames = [picture(30 + number, 20) for number in range(3)]
    return {
        **{kind: encoded(picture(), kind) for kind in kinds},
        "turned JPEG": encoded(picture(), "JPEG", exif=exif),
        "turned PNG": encoded(picture(), "PNG", exif=exif),
        "turned WebP": encoded(picture(), "WEBP", exif=exif),
        "progressive": encoded(picture(), "JPEG", progressive=True),
        "animated GIF": encoded(picture(), "GIF", save_all=True, append_images=frames),
        "animated WebP": encoded(picture(), "WEBP", save_all=True, append_images=[picture()] * 3),
        "palette": encoded(picture(mode="P"), "PNG", transparency=0),
        "MPO": encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
    }


IMAGES = images()


def read_image(reader: MediaReader, name: str) -> str | tuple[int, int]:
    """Return (height, width) that header and pixels agree about, or the category of what is wrong."""
    try:
        size = reader.image_size(ImageItem(name))
        pixels = reader.read_pixels(ImageItem(name))
    except SampleError as error:
        assert name in error.reason and len(error.reason) < LONGEST_MESSAGE
        return error.category
    assert tuple(pixels.shape) == (3, *size)
    return size


@EFFORTS
def test_damaged_images(tmp_path: Path, effort: int) -> None:
    reader, keeping = MediaReader(str(tmp_path)), MediaReader(str(tmp_path), keep_images=True)

    def check(case: tuple[str, bytes]) -> None:
        (tmp_path / "a.png").write_bytes(case[1])
        read_image(reader, "a.png")
        (tmp_path / "kept").write_bytes(case[1])
        keeping._kept = {}
        read_image(keeping, "kept")

    fuzz(check, damaged(IMAGES), 400, effort)


def png_of(width: int, height: int) -> bytes:
    """A PNG that says its size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def icon_of(content: bytes) -> bytes:
    """An icon of 16 x 16 pixels whose picture is a PNG."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22) + content


def jpeg_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(picture(), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def gif_of(width: int, height: int) -> bytes:
    content = bytearray(encoded(picture(), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def webp_of(width: int, height: int) -> bytes:
    """A WebP whose canvas is larger than what is on it."""
    canvas = struct.pack("<I", 2)[:4] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


LIARS: dict[str, tuple[bytes, str]] = {
    "PNG of 60000 x 60000": (png_of(60_000, 60_000), "decompression_bomb"),
    "PNG of 2**31 pixels a side": (png_of(2**31 - 1, 2**31 - 1), "decompression_bomb"),
    "PNG without width": (png_of(0, 10), "truncated"),
    "JPEG of 65500 x 65500": (jpeg_of(65_500, 65_500), "decompression_bomb"),
    "GIF of 65535 x 65535": (gif_of(65_535, 65_535), "decompression_bomb"),
    "WebP of 16000 x 16000": (webp_of(16_000, 16_000), "decompression_bomb"),
    "BMP of 60000 x 60000": (
        encoded(picture(), "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded(picture(), "BMP")[26:],
        "decompression_bomb",
    ),
    "PPM of 99999 x 99999": (b"P6 99999 99999 255 abc", "decompression_bomb"),
    "icon with a PNG of 12000 x 12000": (icon_of(png_of(12_000, 12_000)), "wrong_type"),
}


@pytest.mark.parametrize("case", LIARS)
def test_images_that_lie_about_their_size(tmp_path: Path, case: str) -> None:
    content, category = LIARS[case]
    (tmp_path / "a.png").write_bytes(content)
    assert read_image(MediaReader(str(tmp_path)), "a.png") == category
    assert read_image(MediaReader(str(tmp_path), keep_images=True), "a.png") == category


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_many_frames_the_first_is_read(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (40, 20), (number % 256, number // 256, 0)) for number in range(1500)]
    (tmp_path / "a").write_bytes(encoded(picture(), kind, save_all=True, append_images=frames))
    assert read_image(MediaReader(str(tmp_path)), "a") == (20, 40)


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path: Path) -> None:
    """A file of 100 GB that takes no place on the disk."""
    with (tmp_path / "a.png").open("wb") as file:
        file.write(png_of(10, 10))
        file.truncate(100 << 30)
    assert read_image(MediaReader(str(tmp_path)), "a.png") == "decompression_bomb"
    assert read_image(MediaReader(str(tmp_path), keep_images=True), "a.png") == "decompression_bomb"


def clip(container: str, codec: str, **options: Any) -> bytes:
    """Eight frames of 64 x 48 pixels."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as file:
        track = file.add_stream(codec, rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, options.get("pix_fmt", "yuv420p")
        for number in range(8):
            pixels = np.full((48, 64, 3), 30 * number, np.uint8)
            file.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(track.encode())
    return stream.getvalue()


VIDEOS = {
    "mp4": clip("mp4", "mpeg4"),
    "mov": clip("mov", "mpeg4"),
    "webm": clip("webm", "libvpx"),
    "mkv": clip("matroska", "mpeg4"),
    "avi": clip("avi", "mpeg4"),
    "ts": clip("mpegts", "mpeg2video"),
    "flv": clip("flv", "flv"),
    "gif": clip("gif", "gif", pix_fmt="rgb8"),
    "wmv": clip("asf", "wmv2"),
    "mpg": clip("mpeg", "mpeg1video"),
}


@pytest.fixture(params=[TorchcodecBackend, PyAvBackend])
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MediaReader:
    """Return a reader of ``tmp_path`` with each of the backends that work here."""
    try:
        backend: VideoBackend = request.param()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("qwenvl.data.media.reader.choose_backend", lambda: backend)
    return MediaReader(str(tmp_path), video_timeout=20)


def read_video(reader: MediaReader, source: str | bytes) -> str | int:
    """Return the number of frames, all of which can be decoded, or the category of what is wrong."""
    try:
        header = reader.video_header(VideoItem(source))
        frames = reader.read_frames(VideoItem(source), np.arange(min(header.num_frames, 64)))
    except SampleError as error:
        assert len(error.reason) < LONGEST_MESSAGE and "/dev/fd" not in error.reason
        return error.category
    assert tuple(frames.shape[1:]) == (3, header.height, header.width)
    return header.num_frames


@pytest.mark.parametrize("kind", ["mp4", "mov", "webm", "mkv", "avi", "flv", "wmv", "mpg", "gif", "ts"])
def test_containers_that_are_read(reader: MediaReader, tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.mp4").write_bytes(VIDEOS[kind])
    for source in ("a.mp4", VIDEOS[kind]):
        assert read_video(reader, source) == 8


@EFFORTS
def test_damaged_videos(reader: MediaReader, tmp_path: Path, effort: int) -> None:
    def check(case: tuple[str, bytes]) -> None:
        (tmp_path / "a.mp4").write_bytes(case[1])
        read_video(reader, "a.mp4")

    fuzz(check, damaged(VIDEOS), 40, effort)
