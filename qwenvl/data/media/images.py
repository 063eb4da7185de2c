"""Read images from files or bytes: sizes from their headers, and decoded pixels.

Every function raises :class:`SampleError` for an image that cannot be used, without its name: ``truncated``,
``wrong_type``, ``unreadable_file``, ``decompression_bomb``.
"""

from __future__ import annotations

import functools
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.io import decode_jpeg

from qwenvl.data.media.file_kinds import START_BYTES, foreign_file
from qwenvl.data.media.image_depths import refuse_unscaled, to_eight_bits
from qwenvl.data.media.image_headers import HEADER_BYTES, jpeg_size
from qwenvl.data.types import Source
from qwenvl.utils.errors import SampleError

# Formats of images that Pillow reads by itself; EPS, for one, would run another program. Icons are left out: opening
# one decodes the image in it, which may be far larger than the icon says.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "MPO", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")

IMAGE_BYTES = 512 << 20
"""Size of the largest image file that is read: 89 million pixels, Pillow's limit, take up to 358 MB."""

_SWAPPING_ORIENTATIONS = (5, 6, 7, 8)
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
                   struct.error, zlib.error, RuntimeError, MemoryError)  # fmt: skip
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")


def image_size(located: Source) -> tuple[int, int]:
    """Return (height, width) in pixels, EXIF orientation applied; no pixel is decoded."""
    size = jpeg_size(_first_bytes(located))
    if size is not None and not is_bomb(*size):
        return size
    with opened_image(located) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SWAPPING_ORIENTATIONS else (height, width)


def read_image(located: Source) -> Image.Image:
    """Decode to RGB, EXIF orientation applied, transparency laid on white."""
    with opened_image(located) as image:
        return _upright_rgb(image)


def read_pixels(located: Source) -> torch.Tensor:
    """Decode to uint8 [3, height, width], RGB interleaved in memory: the pixels of :func:`read_image`, but faster."""
    content = read_file(located)
    size = jpeg_size(content[:HEADER_BYTES])
    pixels = None if size is None or is_bomb(*size) else _decode_jpeg(content, size)
    if pixels is not None:
        return pixels
    with opened_image(content) as image:
        if image.format == "JPEG" and _orientation(image) == 1:
            pixels = _decode_jpeg(content, (image.height, image.width))
        return torch.from_numpy(np.array(_upright_rgb(image))).permute(2, 0, 1) if pixels is None else pixels


def read_small_grey(located: Source, side: int) -> Image.Image:
    """Decode an image, squeezed to ``side`` x ``side`` grey pixels, EXIF orientation applied, transparency on white.

    A JPEG is decoded at about the size that is needed, which takes a fraction of the time.
    """
    with opened_image(located) as image:
        image.draft("L", (2 * side, 2 * side))
        upright = _upright_rgb(image).convert("L")
        return upright.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _decode_jpeg(content: bytes, size: tuple[int, int]) -> torch.Tensor | None:
    """Decode an ordinary JPEG with torchvision: the same pixels as Pillow's in half the time.

    Returns None for other colours than RGB and for files that torchvision refuses, such as truncated ones: Pillow then
    decodes them or reports the problem. (torchvision plans to leave decoding to torchcodec, whose ``decode_jpeg`` of
    0.16 is the same.)
    """
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError:
        return None
    return pixels if tuple(pixels.shape) == (3, *size) else None


def read_file(located: Source) -> bytes:
    """Return the bytes of a file."""
    if isinstance(located, bytes):
        return located
    try:
        with _stream(located) as file:
            return file.read()
    except OSError as error:
        raise SampleError("unreadable_file", f"the file cannot be read: {error.strerror}.") from error


def _stream(located: Source) -> IO[bytes]:
    """Open an image, which some of Pillow's readers read whole.

    Raises:
        SampleError: it is larger than :data:`IMAGE_BYTES`.
        OSError: it cannot be opened.
    """
    if isinstance(located, bytes):
        return io.BytesIO(located)
    file = open(located, "rb")  # noqa: SIM115  (the caller closes it)
    size = os.fstat(file.fileno()).st_size
    if size > IMAGE_BYTES:
        file.close()
        reason = f"the file has {size} bytes, more than an image may have ({IMAGE_BYTES >> 20} MiB)."
        raise SampleError("decompression_bomb", f"{reason} Make it smaller, or save it compressed.")
    return file


@contextmanager
def opened_image(located: Source) -> Iterator[Image.Image]:
    """Open an image; what goes wrong while it is in use becomes a SampleError."""
    try:
        with _stream(located) as stream, _open_image(stream) as image:
            yield image
    except SampleError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("decompression_bomb", f"{error}.") from error
    except _DECODER_ERRORS as error:
        cut = isinstance(error, EOFError) or re.search("truncated|broken|unexpected end", str(error), re.I)
        reason = f"the image is {'cut off' if cut else 'damaged'}: {error}."
        raise SampleError("truncated" if cut else "unreadable_file", reason) from error


def _first_bytes(located: Source) -> bytes:
    """Return the first bytes of a file; empty where it cannot be read: opening it reports the error."""
    if isinstance(located, bytes):
        return located[:HEADER_BYTES]
    try:
        descriptor = os.open(located, os.O_RDONLY)  # a file object would take longer than everything else here
        try:
            return os.read(descriptor, HEADER_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return b""


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Return the IMAGE_FORMATS that this Pillow has; it fails on unknown names."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _open_image(stream: IO[bytes]) -> Image.Image:
    """Read an image's header.

    Raises:
        SampleError: it is not an image, has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, or values without a range.
    """
    try:
        image = Image.open(stream, formats=_known_formats())
    except UnidentifiedImageError as error:
        stream.seek(0)
        start = stream.read(START_BYTES)
        if start.startswith(_IMAGE_STARTS):
            raise SampleError("truncated", "the image is cut off or damaged within its header.") from error
        raise foreign_file(start, "image") from error
    if is_bomb(image.height, image.width):  # Pillow itself only warns up to twice this number
        reason = f"the image has {image.width * image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}."
        raise SampleError("decompression_bomb", f"{reason} Make it smaller.")
    if not image.width * image.height:
        raise SampleError("unreadable_file", f"the image has no pixels ({image.width} x {image.height}).")
    refuse_unscaled(image)
    return image


def is_bomb(height: int, width: int) -> bool:
    """Return whether an image or frame has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``."""
    return Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied to ``image.size``, without decoding pixels."""
    if image.format == "TIFF":
        return 1  # Pillow's TIFF reader rotates images itself, and gives their rotated size
    if image.format == "PNG" and "exif" not in image.info and _metadata_follows_pixels(image):
        image.load()
    # The method of the PNG class would decode the pixels to look for metadata after them.
    orientation: int = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation


def _metadata_follows_pixels(image: Image.Image) -> bool:
    """Return whether a PNG has EXIF or text chunks after its pixels, by reading only the heads of its chunks."""
    read_at = _chunk_heads(image.fp)  # type: ignore[attr-defined, unused-ignore]
    place, behind = len(b"\x89PNG\r\n\x1a\n"), False
    while len(head := read_at(place)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if behind and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        behind = behind or kind == b"IDAT"
        place += 12 + length  # with length, kind and checksum
    return False


def _chunk_heads(stream: IO[bytes]) -> Callable[[int], bytes]:
    """Return a function that reads the 8 bytes at an offset, without the buffer, which would read 8 KiB each time."""
    if isinstance(stream, io.BytesIO):
        content = stream.getvalue()
        return lambda place: content[place : place + 8]
    return lambda place: os.pread(stream.fileno(), 8, place)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, and convert to RGB, transparency laid on white."""
    image.load()  # while its file is open
    ImageOps.exif_transpose(image, in_place=True)
    return on_white(to_eight_bits(image))


def on_white(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB, transparency laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
