"""Video decoding: torchcodec where it works, else decord; chosen once a process and never changed for one file.

Both give the same pixels for the same frames, shown as the file's rotation metadata says. What differs: torchcodec
needs FFmpeg's shared libraries from the system; decord carries its own FFmpeg, and garbles videos that are turned by a
quarter, which are refused. Decoders run on one thread, since data loading runs many processes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from qwenvl.data.images import is_bomb
from qwenvl.data.video_files import opened_video
from qwenvl.utilities.errors import SampleError, UserError

_SOURCE_PLACE = re.compile(r"^.*?\.(cpp|cc):\d+[,:] ")  # torchcodec and decord put their own file and line first
_OPEN_FILE = re.compile(r"/dev/fd/\d+")

logger = logging.getLogger(__name__)

PIECE_BYTES = 128 << 20
"""Of decoded frames that are in memory before they are made smaller; a single frame may have more."""

Shrink = Callable[[torch.Tensor], torch.Tensor]
"""From uint8 [n, 3, height, width] to [n, 3, ...]."""


def as_they_are(frames: torch.Tensor) -> torch.Tensor:
    """Return frames without change."""
    return frames


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What is known of a video before it is decoded.

    Args:
        num_frames: frames in the file.
        fps: their average number a second.
        height: pixels, as the video is shown.
        width: pixels.
    """

    num_frames: int
    fps: float
    height: int
    width: int


class VideoBackend(Protocol):
    """A way to decode videos. A source is a path, or the bytes of a file."""

    name: str

    def header(self, source: str | bytes) -> VideoHeader:
        """Read what is known without decoding.

        Raises:
            SampleError: ``wrong_type``, ``unreadable_file`` or ``decompression_bomb``, without the name of the file.
        """
        ...

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """Decode the frames at ``indices`` (int64 [n]) to uint8 [n, 3, height, width], RGB.

        Args:
            source: see above.
            indices: int64 [n].
            shrink: applied to some frames at a time, so that no more than :data:`PIECE_BYTES` of them (or one) are in
                memory at the size of the video.

        Raises:
            SampleError: see :meth:`header`.
        """
        ...


class TorchcodecBackend:
    """Decodes with torchcodec.

    Raises:
        ImportError: torchcodec is not installed, or cannot load FFmpeg.
    """

    name = "torchcodec"

    def __init__(self) -> None:
        try:
            import torchcodec
            import torchcodec.decoders
        except (RuntimeError, OSError) as error:  # how torchcodec before 0.16 says that a library is missing
            raise ImportError(f"torchcodec is installed but cannot load its libraries: {_first_line(error)}") from error
        # From 0.16 it imports without FFmpeg, for the sake of images, and says so here.
        if getattr(torchcodec, "ffmpeg_major_version", "unsaid") is None:
            raise ImportError("torchcodec is installed but finds no FFmpeg libraries")

    def header(self, source: str | bytes) -> VideoHeader:
        """See :class:`VideoBackend`."""
        with self._opened(source) as (_, header):
            return header

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """See :class:`VideoBackend`."""
        with self._opened(source) as (decoder, header):
            return _in_pieces(indices, header, lambda piece: decoder.get_frames_at(indices=piece).data, shrink)

    @contextlib.contextmanager
    def _opened(self, source: str | bytes) -> Iterator[tuple[Any, VideoHeader]]:
        from torchcodec.decoders import VideoDecoder

        with _decoding(self.name), opened_video(source) as path:
            decoder = VideoDecoder(path, dimension_order="NCHW", num_ffmpeg_threads=1, seek_mode="exact")
            known = decoder.metadata
            yield decoder, _checked_header(known.num_frames, known.average_fps, known.height, known.width)


class DecordBackend:
    """Decodes with decord.

    Raises:
        ImportError: decord is not installed, or its library does not load.
    """

    name = "decord"

    def __init__(self) -> None:
        # Loaded before torchcodec, decord's libraries take the place of torchcodec's zlib, and transformers, which
        # opens pictures with torchcodec, can no longer read a PNG in this process.
        with contextlib.suppress(ImportError, RuntimeError, OSError):
            import torchcodec.decoders  # noqa: F401
        try:
            import decord  # noqa: F401
        except (RuntimeError, OSError) as error:
            raise ImportError(f"decord is installed but cannot load its library: {_first_line(error)}") from error

    def header(self, source: str | bytes) -> VideoHeader:
        """See :class:`VideoBackend`."""
        with self._opened(source) as (_, header):
            return header

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """See :class:`VideoBackend`."""
        with self._opened(source) as (reader, header):
            return _in_pieces(
                indices,
                header,
                lambda piece: torch.from_numpy(reader.get_batch(piece).asnumpy()).permute(0, 3, 1, 2),
                shrink,
            )

    @contextlib.contextmanager
    def _opened(self, source: str | bytes) -> Iterator[tuple[Any, VideoHeader]]:
        from decord import VideoReader

        with _decoding(self.name), opened_video(source) as path:
            reader = VideoReader(path, num_threads=1)
            count = len(reader)
            shape = reader[0].shape if count else (0, 0, 3)
            _refuse_turned(shape)
            yield reader, _checked_header(count, reader.get_avg_fps(), shape[0], shape[1])


@functools.cache
def choose_backend() -> VideoBackend:
    """Return the video backend of this process: torchcodec if it works, else decord.

    Raises:
        UserError: neither works; says why.
    """
    reasons = []
    for backend in (TorchcodecBackend, DecordBackend):
        try:
            chosen: VideoBackend = backend()
        except ImportError as error:
            reasons.append(str(error))
        else:
            passed_over = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("Videos are decoded by %s%s.", chosen.name, passed_over)
            return chosen
    raise UserError(
        f"No video backend works: {'; '.join(reasons)}. Run 'pip install decord', or 'pip install torchcodec' and "
        "install FFmpeg ('apt install ffmpeg')."
    )


def prepare_backend() -> None:
    """Choose the backend now, so that processes forked from this one inherit the choice instead of logging it each.

    Having none is no mistake before there is a video to decode.
    """
    try:
        choose_backend()
    except UserError as error:
        logger.debug("%s", error)


def backend_name() -> str | None:
    """Return the name of this process's backend; None where none works. Two of them may count frames differently."""
    try:
        return choose_backend().name
    except UserError:
        return None


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn a decoder's own errors into SampleErrors."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:  # decord's error type derives from Exception alone; torchcodec raises half a dozen
        raise SampleError("unreadable_file", f"{name} cannot decode it: {_first_line(error)}") from error


def _checked_header(num_frames: int | None, fps: float | None, height: int | None, width: int | None) -> VideoHeader:
    if not num_frames or not height or not width:
        raise SampleError("unreadable_file", "the video has no frames.")
    if not fps or not math.isfinite(fps) or fps < 0:
        raise SampleError("unreadable_file", f"the video has no frame rate ({fps}).")
    if is_bomb(height, width):
        raise SampleError("decompression_bomb", f"a frame has {height * width} pixels. Make the video smaller.")
    return VideoHeader(int(num_frames), float(fps), int(height), int(width))


def _in_pieces(
    indices: np.ndarray, header: VideoHeader, read: Callable[[list[int]], torch.Tensor], shrink: Shrink
) -> torch.Tensor:
    """Decode and shrink frames, as many at a time as :data:`PIECE_BYTES` allows."""
    many = max(1, PIECE_BYTES // (3 * header.height * header.width))
    pieces = [shrink(read(indices[start : start + many].tolist())) for start in range(0, max(len(indices), 1), many)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _refuse_turned(shape: tuple[int, ...]) -> None:
    if shape[-1] != 3:  # decord 0.6 gives frames turned by a quarter four channels of garbled bytes
        raise SampleError(
            "unreadable_file",
            "decord cannot decode a video that its metadata turns by a quarter. Install FFmpeg ('apt install ffmpeg'), "
            "so that torchcodec can be used, or turn the frames themselves.",
        )


def _first_line(error: BaseException) -> str:
    lines = _OPEN_FILE.sub("the file", _SOURCE_PLACE.sub("", str(error).strip())).splitlines()
    return lines[0][:300] if lines else type(error).__name__
