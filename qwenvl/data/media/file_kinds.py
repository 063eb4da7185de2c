"""Recognize by its first bytes a file that is not the expected image or video, and say what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from qwenvl.utils.errors import SampleError

START_BYTES = 1024
"""Bytes from the start of a file that it is recognized by."""

Wanted = Literal["image", "video"]

STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif")
"""Brands of files in the layout of MP4 that hold photos."""
_VIDEO_STARTS = (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"\x00\x00\x01\xba")
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*")
_READ = {
    "image": "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG2000 and PPM",
    "video": "MP4, MOV, MKV, WebM, AVI, MPEG-TS, FLV, WMV, GIF and animated WebP",
}


def foreign_file(start: bytes, wanted: Wanted) -> SampleError:
    """Return the error (``wrong_type``) for a file of another kind than expected: what it is, and the remedy.

    Args:
        start: The first :data:`START_BYTES` bytes of the file.
        wanted: Expected kind of file.
    """
    for is_one, what, remedy in _KINDS:
        if is_one(start):
            return SampleError("wrong_type", f"it holds {what}, not {_a(wanted)} that can be read. {remedy}")
    if (wanted == "image" and _is_video(start)) or (wanted == "video" and start.startswith(_IMAGE_STARTS)):
        other: Wanted = "video" if wanted == "image" else "image"
        return SampleError("wrong_type", f"it holds {_a(other)}, not {_a(wanted)}. Give it as `{other}`, with its tag.")
    shown = start[:60] if start[:60].isascii() and start[:60].decode("ascii").isprintable() else start[:16]
    reason = f"it is not {_a(wanted)} that can be read; it starts with {shown!r}."
    return SampleError("wrong_type", f"{reason} Convert it: {_READ[wanted]} are read.")


def _a(wanted: Wanted) -> str:
    return "an image" if wanted == "image" else "a video"


def _is_video(start: bytes) -> bool:
    is_mp4 = start[4:8] in (b"ftyp", b"moov", b"mdat") and start[8:12] not in STILL_BRANDS
    return start.startswith(_VIDEO_STARTS) or is_mp4 or (start.startswith(b"RIFF") and start[8:12] == b"AVI ")


def _starts(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda start: start.startswith(prefixes)


def _opens(*words: bytes) -> Callable[[bytes], bool]:
    """Return a check whether a text starts with one of some lower-case words, after white space and a BOM."""
    return lambda start: start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(words)


def _is_svg(start: bytes) -> bool:
    return _opens(b"<svg", b"<?xml", b"<!--", b"<!doctype svg")(start) and b"<svg" in start.lower()


def _is_sound(start: bytes) -> bool:
    return start.startswith((b"ID3", b"fLaC", b"\xff\xfb", b"\xff\xf3")) or start[8:12] == b"WAVE"


_SENT = "It may be the error message of a server. Download the file again."
_UNPACK = "Unpack it, and name the files that it holds."
_TO_PNG = "Convert it to PNG"

_KINDS: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (
        _opens(b"version https://git-lfs"),
        "a Git LFS pointer",
        "Fetch the file: run `git lfs pull` in its folder.",
    ),
    (_is_svg, "an SVG drawing", "Render it to PNG."),
    (_opens(b"<!doctype html", b"<html", b"<head", b"<body"), "an HTML page", _SENT),
    (_opens(b"<?xml"), "an XML document", _SENT),
    (_opens(b"{", b"["), "JSON text", _SENT),
    (_opens(b"#extm3u", b"ffconcat"), "a playlist of other files", "Name a file that holds its video itself."),
    (_starts(b"%PDF"), "a PDF document", "Render its pages to images, such as by `pdftoppm -png -r 150 a.pdf page`."),
    (_starts(b"%!PS", b"\xc5\xd0\xd3\xc6"), "a PostScript drawing", "Render it to PNG."),
    (
        lambda start: start[4:8] == b"ftyp" and start[8:12] in STILL_BRANDS[:-1],
        "a HEIC (HEIF) photo",
        "Convert it to JPEG, such as by `heif-convert a.heic a.jpg`.",
    ),
    (
        lambda start: start[4:12] == b"ftypavif",
        "an AVIF image",
        "Give it as `image`, with its tag.",
    ),
    (_starts(b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL image", f"{_TO_PNG}."),
    (_starts(b"8BPS"), "a Photoshop file", f"{_TO_PNG}."),
    (_starts(b"\0\0\1\0"), "an icon", f"{_TO_PNG}."),
    (_starts(b"v/1\x01", b"#?RADIANCE", b"#?RGBE"), "a high dynamic range image", f"{_TO_PNG} of 8 bits."),
    (lambda start: start[128:132] == b"DICM", "a DICOM file", "Apply its window, and save the image as an 8-bit PNG."),
    (
        _starts(b"\x93NUMPY", b"\x89HDF"),
        "an array of numbers (NumPy or HDF5)",
        "Save it as PNG, or as a video.",
    ),
    (_starts(b"PK\x03\x04", b"PK\x05\x06"), "a zip archive, or a document in one", _UNPACK),
    (_starts(b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"), "an archive", _UNPACK),
    (lambda start: start[257:262] == b"ustar", "a tar archive", _UNPACK),
    (_is_sound, "a sound file", "These models take images and videos."),
    (
        lambda start: len(start) >= 16 and not any(start),
        "a file of zeros",
        "It may be a download that was not finished. Download it again.",
    ),
)
