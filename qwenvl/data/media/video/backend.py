"""Shared by all video backends: their protocol, the header of a video, decoding in pieces, and errors."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from qwenvl.data.media.images import is_bomb
from qwenvl.utils.errors import SampleError

_SOURCE_PLACE = re.compile(r"^.*?\.(cpp|cc):\d+[,:] ")  # torchcodec puts its own file and line first
_OPEN_FILE = re.compile(r"'?/dev/fd/\d+'?")

PIECE_BYTES = 128 << 20
"""Bytes of decoded frames in memory before they are shrunk; a single frame may have more."""

Shrink = Callable[[torch.Tensor], torch.Tensor]
"""Function from uint8 [n, 3, height, width] to [n, 3, ...]."""


def as_they_are(frames: torch.Tensor) -> torch.Tensor:
    """Return frames without change."""
    return frames


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Facts about a video that are known before it is decoded.

    Args:
        num_frames: Number of frames in the file.
        fps: Average frames per second.
        height: Height in pixels, as the video is shown.
        width: Width in pixels, as the video is shown.
        times: Time of every frame in seconds from the first one, ascending; None where frame ``n`` is shown at
            ``n / fps``, as in most videos.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    times: tuple[float, ...] | None = None


class VideoBackend(Protocol):
    """A way to decode videos. A source is a path, or the bytes of a file."""

    name: str

    def header(self, source: str | bytes) -> VideoHeader:
        """Return the header, decoding no more than one frame.

        Raises:
            SampleError: ``wrong_type``, ``unreadable_file`` or ``decompression_bomb``, without the name of the file.
        """
        ...

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """Decode the frames at ``indices`` (int64 [n]) to uint8 [n, 3, height, width], RGB.

        Args:
            source: Path, or the bytes of a file.
            indices: int64 [n], numbers of the frames.
            shrink: Function applied to some frames at a time, so that no more than :data:`PIECE_BYTES` of them (or one)
                are in memory at the size of the video.

        Raises:
            UndecodedVideoError: this backend cannot decode the file, but another one may.
            SampleError: see :meth:`header`.
        """
        ...


class UndecodedVideoError(SampleError):
    """A video that a backend cannot decode, but another one may."""


def make_header(times: Sequence[float], duration: float, height: int, width: int) -> VideoHeader:
    """Return a header.

    Args:
        times: Time of every frame in seconds from the first one, ascending.
        duration: Seconds from the first frame to the end of the last one.
        height: Height in pixels, as the video is shown.
        width: Width in pixels, as the video is shown.

    Raises:
        SampleError: the video cannot be used.
    """
    count = len(times)
    header = checked_header(count, count / duration if duration > 0 else None, height, width)
    # Rates that are constant except for rounding, such as to milliseconds, count as constant: servers assume a constant
    # rate too.
    apart = np.abs(np.asarray(times) - np.arange(count) / header.fps).max()
    return header if apart <= 0.5 / header.fps else VideoHeader(count, header.fps, height, width, tuple(times))


def checked_header(num_frames: int | None, fps: float | None, height: int | None, width: int | None) -> VideoHeader:
    """Return a header of constant rate.

    Raises:
        SampleError: there is no frame, no rate, or a frame has too many pixels.
    """
    if not num_frames or not height or not width:
        raise SampleError("unreadable_file", "the video has no frames.")
    if not fps or not math.isfinite(fps) or fps < 0:
        raise SampleError("unreadable_file", f"the video has no frame rate ({fps}).")
    if is_bomb(height, width):
        raise SampleError("decompression_bomb", f"a frame has {height * width} pixels. Make the video smaller.")
    return VideoHeader(int(num_frames), float(fps), int(height), int(width))


def in_pieces(
    indices: np.ndarray, height: int, width: int, read: Callable[[list[int]], torch.Tensor], shrink: Shrink
) -> torch.Tensor:
    """Decode and shrink frames, as many at a time as :data:`PIECE_BYTES` allows."""
    many = max(1, PIECE_BYTES // (3 * height * width))
    pieces = [shrink(read(indices[start : start + many].tolist())) for start in range(0, max(len(indices), 1), many)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@contextlib.contextmanager
def decoding(name: str, error_type: type[SampleError] = SampleError, cure: str = "") -> Iterator[None]:
    """Turn a decoder's own errors into SampleErrors that name the decoder and end with ``cure``."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:  # torchcodec raises half a dozen types
        raise error_type("unreadable_file", f"{name} cannot decode it: {first_line(error)}{cure}") from error


def first_line(error: BaseException) -> str:
    """Return the message of a decoder's error, without its source location and the number of the open file."""
    said = getattr(error, "strerror", None) or str(error)  # PyAV adds a number and a function of FFmpeg
    lines = _OPEN_FILE.sub("the file", _SOURCE_PLACE.sub("", said.strip())).splitlines()
    return lines[0][:300] if lines else type(error).__name__
