"""Open video files safely for decoders: self-contained containers only, under a neutral name.

FFmpeg chooses a format by a file's content, and partly by its name. A playlist (HLS, DASH, ffconcat, SDP) makes it open
other files and URLs anywhere, and names such as ``concat:a|b`` or ``a%d.png`` stand for other files. Therefore a file
must begin like a container that holds its video itself, and is passed on as an open file. FFmpeg then treats it as a
local file, which may not refer to the network, even where the video came as bytes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO

from qwenvl.data.media.file_kinds import START_BYTES, STILL_BRANDS, foreign_file
from qwenvl.data.types import Source
from qwenvl.utils.errors import SampleError

_STARTS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"OggS\x00",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
    b"GIF87a",
    b"GIF89a",
    b"\x00\x00\x01",  # MPEG program streams, and H.264, H.265 and MPEG without a container
    b"\x00\x00\x00\x01",
)
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")  # of MP4 and QuickTime
_PACKETS = ((0, 188), (4, 192))  # MPEG transport streams: place of the first sync byte, bytes of a packet


@contextlib.contextmanager
def opened_video(source: Source) -> Iterator[str]:
    """Open a video, check its first bytes, and yield a path by which a decoder can open the same file.

    Args:
        source: Path of the file, or its bytes.

    Raises:
        SampleError: it does not begin like a video (``wrong_type``), or cannot be read (``unreadable_file``).
    """
    with _stream(source) as file:
        start = file.read(START_BYTES)
        if not _holds_its_video(start):
            raise foreign_file(start, "video")
        yield f"/dev/fd/{file.fileno()}"


def first_bytes(source: Source) -> bytes:
    """Return the first bytes of a video; empty where it cannot be read: opening it reports the error."""
    if isinstance(source, bytes):
        return source[:START_BYTES]
    try:
        with open(source, "rb") as file:
            return file.read(START_BYTES)
    except OSError:
        return b""


def _stream(source: Source) -> IO[bytes]:
    try:
        if isinstance(source, str):
            return open(source, "rb")
        file = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
        file.write(source)
        file.seek(0)
        return file
    except OSError as error:
        raise SampleError("unreadable_file", f"the file cannot be read: {error.strerror}.") from error


def _holds_its_video(start: bytes) -> bool:
    if start.startswith(_STARTS) or start[4:8] in _BOXES:
        return start[8:12] not in STILL_BRANDS
    if start.startswith(b"RIFF"):
        return start[8:12] in (b"AVI ", b"WEBP")
    return any(start[first : first + 5 * size : size] == b"\x47" * 5 for first, size in _PACKETS)
