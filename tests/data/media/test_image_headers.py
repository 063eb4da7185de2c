"""Sizes read from the first bytes of JPEG files are Pillow's own, or are left to it."""

from __future__ import annotations

import io
import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from qwenvl.data.media.image_headers import HEADER_BYTES, jpeg_size
from tests.data.images import encoded, picture

ORIENTATION = ExifTags.Base.Orientation


def by_pillow(content: bytes) -> tuple[int, int] | None:
    """(height, width) as shown; None where Pillow refuses the file."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError):
        return None


def with_segment(content: bytes, marker: int, payload: bytes) -> bytes:
    """Put an application segment or comment at the start of a JPEG file."""
    return content[:2] + bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload + content[2:]


saved = st.fixed_dictionaries(
    {"quality": st.integers(1, 95), "progressive": st.booleans(), "optimize": st.booleans()},
    optional={
        "subsampling": st.sampled_from([0, 1, 2]),
        "comment": st.binary(max_size=40),
        "icc_profile": st.binary(min_size=1, max_size=5000),
        "restart_marker_blocks": st.integers(1, 4),
    },
)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["L", "RGB", "CMYK"]), saved)
@settings(max_examples=80)
def test_files_as_pillow_writes_them(width: int, height: int, mode: str, options: dict[str, Any]) -> None:
    content = encoded(Image.new(mode, (width, height)), "JPEG", **options)
    assert jpeg_size(content[:HEADER_BYTES]) == (height, width) == by_pillow(content)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_metadata_that_may_turn_a_picture_is_left_to_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert jpeg_size(encoded(picture(), "JPEG", exif=exif)) is None
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + f'<x tiff:Orientation="{orientation}"/>'.encode()
    turned = with_segment(encoded(picture(30, 20), "JPEG"), 0xE1, xmp)
    assert jpeg_size(turned) is None
    assert by_pillow(turned) == ((30, 20) if orientation > 4 else (20, 30))


def test_what_is_not_a_plain_jpeg_is_left_to_pillow() -> None:
    content = encoded(picture(), "JPEG")
    assert jpeg_size(content) is not None
    for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF"):
        assert jpeg_size(encoded(picture(), kind)) is None
    assert jpeg_size(b"") is None
    assert jpeg_size(with_segment(content, 0xE2, b"MPF\0" + bytes(20))) is None  # several pictures in one file
    assert jpeg_size(with_segment(content, 0xE2, b"ICC_PROFILE\0")) is None  # at which Pillow stumbles
    assert jpeg_size(with_segment(content, 0xE0, bytes(60_000))[:HEADER_BYTES]) is None  # larger than what is read


CONTENTS = [
    encoded(picture(), "JPEG"),
    encoded(picture(mode="L"), "JPEG", progressive=True, icc_profile=b"profile"),
    encoded(picture(mode="CMYK"), "JPEG", comment=b"words", restart_marker_blocks=1),
]


@given(st.sampled_from(CONTENTS), st.integers(0, 2**32), st.integers(1, 4), st.booleans())
@settings(max_examples=1500)
def test_damage_is_never_taken_for_a_size(content: bytes, seed: int, changes: int, cut: bool) -> None:
    """A size is only given where Pillow gives the same one; where it refuses the file, it is left to say why."""
    rng = random.Random(seed)
    damaged = bytearray(content)
    header = content.index(b"\xff\xda") + 14
    for _ in range(changes):
        place = rng.randrange(header)
        damaged[place] = rng.choice([0, 0xFF, rng.randrange(256), rng.choice(content[:header])])
    if cut:
        del damaged[rng.randrange(len(damaged)) :]
    size = jpeg_size(bytes(damaged[:HEADER_BYTES]))
    assert size is None or size == by_pillow(bytes(damaged))
