"""Opening media: sizes equal to what decoding gives, pixels equal to transformers', and every bad file explained."""

from __future__ import annotations

import base64
import inspect
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from qwen_vl_utils.vision_process import to_rgb
from transformers import image_transforms
from transformers.image_utils import load_image

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.types import ImageItem, VideoItem
from qwenvl.utils.errors import SampleError
from tests.data.images import both, encoded, picture, reason_of
from tests.data.media.video.test_decode import FPS, FRAMES, HEIGHT, WIDTH, make_video


@pytest.mark.parametrize(
    ("kind", "orientation"),
    [
        *((kind, None) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "GIF", "JPEG2000", "PPM")),
        *((kind, orientation) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") for orientation in range(1, 9)),
    ],
)
def test_the_header_gives_the_size_that_decoding_gives(
    tmp_path: Path, reader: MediaReader, kind: str, orientation: int | None
) -> None:
    options: dict[str, Any] = {}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    path = tmp_path / "media" / "a"
    path.write_bytes(encoded(picture(), kind, **options))
    image = reader.read_image(ImageItem("a"))
    assert reader.image_size(ImageItem("a")) == (image.height, image.width)
    assert image.size == ((20, 40) if orientation in (5, 6, 7, 8) else (40, 20))
    assert np.array_equal(np.array(image), np.array(load_image(str(path))))


XMP = '<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf tiff:Orientation="6"/></x:xmpmeta>'


def png_with_late_chunk(kind: bytes, content: bytes) -> bytes:
    data = encoded(picture(), "PNG")
    end = data.rfind(b"IEND") - 4
    body = kind + content
    return data[:end] + struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)) + data[end:]


def late_exif() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return png_with_late_chunk(b"eXIf", exif.tobytes()[6:])


def xmp_in_text() -> bytes:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    return encoded(picture(), "PNG", pnginfo=info)


def mpo() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(picture(), "MPO", save_all=True, append_images=[picture()], exif=exif)


@pytest.mark.parametrize(
    "content",
    [
        late_exif(),
        xmp_in_text(),
        png_with_late_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode()),
        mpo(),
        encoded(picture(), "JPEG", xmp=XMP.encode()),
        encoded(picture(), "WEBP", xmp=XMP.encode()),
    ],
    ids=["EXIF behind the pixels", "XMP", "XMP behind the pixels", "MPO", "XMP of a JPEG", "XMP of a WebP"],
)
def test_orientation_is_found_wherever_it_stands(tmp_path: Path, reader: MediaReader, content: bytes) -> None:
    (tmp_path / "media" / "a.png").write_bytes(content)
    assert reader.image_size(ImageItem("a.png")) == (40, 20)
    assert reader.read_image(ImageItem("a.png")).size == (20, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "BMP", "GIF"])
def test_the_header_probe_decodes_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels that are cut off do not matter to it, and no decoder is made."""
    data = encoded(picture(400, 200), kind)
    (tmp_path / "a").write_bytes(data if kind in ("TIFF", "WEBP") else data[: len(data) * 2 // 3])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the probe decodes"))
    assert MediaReader(str(tmp_path)).image_size(ImageItem("a")) == (200, 400)


def as_transformers(path: Path) -> np.ndarray:
    """Convert as image processors do; before transparency was laid on white there, as if they did."""
    image = Image.open(path)
    if "return_numpy" in inspect.signature(image_transforms.convert_to_rgb).parameters:
        return np.asarray(image_transforms.convert_to_rgb(image, return_numpy=True))
    pixels = np.array(image.convert("RGBA"), dtype=np.float64)
    alpha = pixels[..., 3:] / 255
    return np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_colours_are_those_of_transformers(tmp_path: Path, reader: MediaReader, mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    path = tmp_path / "media" / "a"
    path.write_bytes(encoded(picture(mode=mode), kind))
    image = reader.read_image(ImageItem("a"))
    assert image.mode == "RGB"
    difference = np.array(image).astype(int) - as_transformers(path)
    assert np.abs(difference).max() <= (1 if mode in ("RGBA", "LA") else 0)
    if mode == "RGBA":
        assert np.abs(np.array(image).astype(int) - np.array(to_rgb(Image.open(path)))).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_white(tmp_path: Path, reader: MediaReader, mode: str) -> None:
    colour: Any = {"P": 0, "L": 0, "RGB": (0, 0, 0)}[mode]
    path = tmp_path / "media" / "a.png"
    path.write_bytes(encoded(Image.new(mode, (4, 4), colour), "PNG", transparency=colour))
    pixels = np.array(reader.read_image(ImageItem("a.png")))
    assert (pixels == 255).all()
    assert np.array_equal(pixels, as_transformers(path))


def noise(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


UNREADABLE: dict[str, tuple[bytes, str, str]] = {
    "zero bytes": (b"", "zero_byte", "0 bytes"),
    "a web page": (b"<html>404</html>", "wrong_type", "an HTML page"),
    "JPEG cut in its header": (noise("JPEG")[:30], "truncated", "cut off"),
    "PNG cut in its header": (noise("PNG")[:20], "truncated", "cut off"),
    "BMP cut in its header": (b"BM123", "truncated", "header"),
    "EPS, which would start a program": (encoded(picture(), "EPS"), "wrong_type", "not an image"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_not_an_image_is_explained(tmp_path: Path, reader: MediaReader, case: str) -> None:
    content, category, words = UNREADABLE[case]
    (tmp_path / "media" / "a.jpg").write_bytes(content)
    for call in both(reader, "a.jpg"):
        reason = reason_of(call, category)
        assert words in reason and str(tmp_path / "media" / "a.jpg") in reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_pixels_are_found_when_read(tmp_path: Path, reader: MediaReader, kind: str, share: float) -> None:
    data = noise(kind)
    (tmp_path / "media" / "a.jpg").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SampleError) as caught:
        reader.read_image(ImageItem("a.jpg"))
    assert caught.value.category in ("truncated", "unreadable_file")
    assert kind not in ("JPEG", "PNG") or caught.value.category == "truncated"
    assert str(tmp_path / "media" / "a.jpg") in caught.value.reason


def test_decompression_bombs_are_refused(
    tmp_path: Path, reader: MediaReader, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "media" / "a.png").write_bytes(encoded(picture(40, 20), "PNG"))
    for limit in (799, 100):  # Pillow warns at the first, and raises at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for call in both(reader, "a.png"):
            assert "800" in reason_of(call, "decompression_bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    assert reader.image_size(ImageItem("a.png")) == (20, 40)


@pytest.mark.filterwarnings("error")
def test_bombs_are_refused_where_warnings_are_errors(
    tmp_path: Path, reader: MediaReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "media" / "a.png").write_bytes(encoded(picture(40, 20), "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 799)
    reason_of(both(reader, "a.png")[0], "decompression_bomb")


@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_damaged_files_give_an_image_or_a_sample_error(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    content = bytearray(encoded(picture(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    for call in both(MediaReader(str(tmp_path)), "a"):
        try:
            call()
        except SampleError as error:
            assert str(path) in error.reason


def test_videos(tmp_path: Path, reader: MediaReader) -> None:
    path = make_video(tmp_path / "media" / "a.mp4")
    uri = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    copy: MediaReader = pickle.loads(pickle.dumps(reader))
    for source in ("a.mp4", f"file://{path}", uri, path.read_bytes()):
        header = copy.video_header(VideoItem(source))
        assert (header.num_frames, header.fps, header.height, header.width) == (FRAMES, FPS, HEIGHT, WIDTH)
        frames = copy.read_frames(VideoItem(source), np.array([3, 1]))
        assert (frames.shape, frames.dtype) == ((2, 3, HEIGHT, WIDTH), torch.uint8)
        assert frames[0, 0, 0, -1] > frames[1, 0, 0, -1]


@pytest.mark.parametrize(
    ("content", "category"), [(None, "missing_file"), (b"", "zero_byte"), (b"junk" * 99, "wrong_type")]
)
def test_bad_videos_are_explained(tmp_path: Path, reader: MediaReader, content: bytes | None, category: str) -> None:
    if content is not None:
        (tmp_path / "media" / "a.mp4").write_bytes(content)
    item = VideoItem("a.mp4")
    for call in (lambda: reader.video_header(item), lambda: reader.read_frames(item, np.array([0]))):
        assert str(tmp_path / "media" / "a.mp4") in reason_of(call, category)


def test_frames_as_a_video(tmp_path: Path, reader: MediaReader) -> None:
    names = tuple(f"{number}.png" for number in range(4))
    for number, name in enumerate(names):
        Image.new("RGB", (32, 24), (number * 10, 0, 200)).save(tmp_path / "media" / name)
    item = VideoItem(names, fps=4.0)
    header = reader.video_header(item)
    assert (header.num_frames, header.fps, header.height, header.width) == (4, 4.0, 24, 32)
    assert reader.video_header(VideoItem(names)).fps == 2.0
    frames = reader.read_frames(item, np.array([2, 0, 2]))
    assert (frames.shape, frames.dtype) == ((3, 3, 24, 32), torch.uint8)
    assert frames[:, :, 5, 7].tolist() == [[20, 0, 200], [0, 0, 200], [20, 0, 200]]

    Image.new("RGB", (30, 24)).save(tmp_path / "media" / names[3])
    for call in (lambda: reader.video_header(item), lambda: reader.read_frames(item, np.array([0, 3]))):
        reason = reason_of(call, "bad_record")
        assert "3.png is 30 x 24" in reason and "0.png is 32 x 24" in reason
    (tmp_path / "media" / names[1]).unlink()
    assert "1.png does not exist" in reason_of(lambda: reader.video_header(item), "missing_file")


def test_the_official_media() -> None:
    folder = Path(__file__).resolve().parents[3].parent / "shared" / "golden" / "media"
    if not folder.is_dir():
        pytest.skip("the golden media are not here")
    reader = MediaReader(str(folder))
    for path in sorted(folder.iterdir()):
        if path.suffix == ".mp4":
            header = reader.video_header(VideoItem(path.name))
            frames = reader.read_frames(VideoItem(path.name), np.array([0, header.num_frames - 1]))
            assert frames.shape == (2, 3, header.height, header.width)
        else:
            image = reader.read_image(ImageItem(path.name))
            assert reader.image_size(ImageItem(path.name)) == (image.height, image.width)
            assert np.array_equal(np.array(image), np.array(load_image(str(path))))
