"""Decode animated GIF and WebP files as videos with Pillow, transparency laid on white as for images.

FFmpeg does not read animated WebP.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from PIL import Image

from qwenvl.data.media.images import on_white, opened_image
from qwenvl.data.media.video.backend import Shrink, VideoHeader, as_they_are, checked_header, in_pieces, make_header

_DEFAULT_SECONDS = 0.1  # of a frame with duration 0, as in browsers


class AnimationBackend:
    """Decodes animations with Pillow."""

    name = "Pillow"

    def header(self, source: str | bytes) -> VideoHeader:
        """See :class:`~qwenvl.data.media.video.backend.VideoBackend`."""
        with opened_image(source) as image:
            seconds = [_seconds(image, index) for index in range(getattr(image, "n_frames", 1))]
            times = [0.0, *itertools.accumulate(seconds[:-1])]
            return make_header(times, sum(seconds), image.height, image.width)

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """See :class:`~qwenvl.data.media.video.backend.VideoBackend`."""
        with opened_image(source) as image:
            checked_header(1, 1.0, image.height, image.width)
            return in_pieces(indices, image.height, image.width, lambda piece: _read(image, piece), shrink)


def is_animation(start: bytes) -> bool:
    """Return whether a file with these first bytes is a GIF or WebP."""
    return start.startswith((b"GIF87a", b"GIF89a")) or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")


def _seconds(image: Image.Image, index: int) -> float:
    """Return how long a frame is shown."""
    image.seek(index)
    image.load()  # a WebP has its duration only now
    return float(image.info.get("duration", 0)) / 1000 or _DEFAULT_SECONDS


def _read(image: Image.Image, indices: list[int]) -> torch.Tensor:
    """Decode frames: uint8 [n, 3, height, width]. Each may need the frames before it, so none is decoded twice."""
    found = {}
    for index in sorted(set(indices)):
        image.seek(index)
        found[index] = torch.from_numpy(np.array(on_white(image.copy())))
    return torch.stack([found[index] for index in indices]).permute(0, 3, 1, 2)
