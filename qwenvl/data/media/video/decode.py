"""Decode videos with torchcodec where it works, else with PyAV; chosen once per process.

Both return the same pixels for the same frames, rotated as the file's metadata says. torchcodec, which transformers
decodes with, needs FFmpeg's shared libraries from the system; PyAV carries its own. PyAV also decodes videos that
torchcodec cannot, and reads all headers, so that these do not depend on the choice. Pillow reads animations. Decoders
run on one thread, since data loading runs many processes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from qwenvl.data.media.video.animations import AnimationBackend, is_animation
from qwenvl.data.media.video.backend import (
    Shrink,
    UndecodedVideoError,
    VideoBackend,
    VideoHeader,
    as_they_are,
    decoding,
    first_line,
    in_pieces,
)
from qwenvl.data.media.video.files import first_bytes, opened_video
from qwenvl.data.media.video.pyav import PyAvBackend, read_header
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)


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
        except (RuntimeError, OSError) as error:  # torchcodec before 0.16, where a library is missing
            raise ImportError(f"torchcodec is installed but cannot load its libraries: {first_line(error)}") from error
        # From 0.16 on it can be imported without FFmpeg, for images; the version is then None.
        if getattr(torchcodec, "ffmpeg_major_version", "unsaid") is None:
            raise ImportError("torchcodec is installed but finds no FFmpeg libraries")

    def header(self, source: str | bytes) -> VideoHeader:
        """See :class:`VideoBackend`."""
        return read_header(source)

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """See :class:`VideoBackend`."""
        with self._opened(source) as decoder:
            known = decoder.metadata
            if len(indices) and int(indices.max()) >= known.num_frames:
                reason = f"torchcodec finds {known.num_frames} frames, fewer than the file has packets."
                raise UndecodedVideoError("unreadable_file", reason)
            return in_pieces(
                indices, known.height, known.width, lambda piece: decoder.get_frames_at(indices=piece).data, shrink
            )

    @contextlib.contextmanager
    def _opened(self, source: str | bytes) -> Iterator[Any]:
        from torchcodec.decoders import VideoDecoder

        with opened_video(source) as path, decoding(self.name, UndecodedVideoError):
            yield VideoDecoder(path, dimension_order="NCHW", num_ffmpeg_threads=1, seek_mode="exact")


class FallbackBackend:
    """Decodes animations with Pillow, other videos with a chosen backend, and with PyAV where that backend cannot.

    Args:
        chosen: The backend of the process.
    """

    def __init__(self, chosen: VideoBackend) -> None:
        self.name = chosen.name
        self._chosen = chosen

    def header(self, source: str | bytes) -> VideoHeader:
        """See :class:`VideoBackend`."""
        return self._backend(source).header(source)

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """See :class:`VideoBackend`."""
        try:
            return self._backend(source).frames(source, indices, shrink)
        except UndecodedVideoError as error:
            logger.debug("PyAV decodes a video: %s", error)
            return PyAvBackend().frames(source, indices, shrink)

    def _backend(self, source: str | bytes) -> VideoBackend:
        return AnimationBackend() if is_animation(first_bytes(source)) else self._chosen


@functools.cache
def choose_backend() -> VideoBackend:
    """Return the video backend of this process: torchcodec if it works, else PyAV.

    Raises:
        UserError: neither works; the message says why.
    """
    reasons = []
    for backend in (TorchcodecBackend, PyAvBackend):
        try:
            chosen: VideoBackend = backend()
        except ImportError as error:
            reasons.append(str(error))
        else:
            passed_over = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("Videos are decoded by %s%s.", chosen.name, passed_over)
            return chosen
    raise UserError(f"No video backend works: {'; '.join(reasons)}. Run 'pip install av'.")


def prepare_backend() -> None:
    """Choose the backend now, so that forked processes inherit the choice instead of each logging it.

    Having no backend is not an error until there is a video to decode.
    """
    try:
        choose_backend()
    except UserError as error:
        logger.debug("%s", error)


def backend_name() -> str | None:
    """Return the name of this process's backend; None where none works."""
    try:
        return choose_backend().name
    except UserError:
        return None
