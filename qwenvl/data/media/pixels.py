"""Decode images and videos and resize them to the planned sizes, as uint8.

The training device rescales, normalises and cuts patches (:mod:`qwenvl.models.vision.patchify`), so that workers send
an eighth of the bytes of float32 patches to the trainer.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from qwenvl.data.media.resize import ImagePlan, MediaPlan
from qwenvl.data.media.video.backend import Shrink
from qwenvl.data.types import ImageItem, VideoItem


class PixelReader(Protocol):
    """The part of :class:`qwenvl.data.media.reader.MediaReader` that decodes."""

    def read_pixels(self, item: ImageItem) -> torch.Tensor:
        """Decode an image: uint8 [3, height, width], RGB."""

    def read_frames(self, item: VideoItem, indices: np.ndarray, shrink: Shrink) -> torch.Tensor:
        """Decode frames of a video, some at a time, and shrink them: uint8 [n, 3, height, width], RGB."""


def read_resized(plan: MediaPlan, reader: PixelReader) -> torch.Tensor:
    """Decode an image or video and resize it as planned.

    Size and operation are those of the checkpoint's own processor: torchvision's bicubic resize with antialiasing, on
    integers. The pixels are bit-identical.

    Returns:
        uint8 [frames, height, width, 3], RGB, contiguous; one frame for an image.

    Raises:
        SampleError: the file cannot be decoded.
    """
    if isinstance(plan, ImagePlan):
        frames = _resize(reader.read_pixels(plan.item)[None], plan.resized)
    else:
        frames = reader.read_frames(plan.item, plan.indices, lambda frames: _resize(frames, plan.resized))
    return frames.permute(0, 2, 3, 1).contiguous()


def _resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize uint8 [n, 3, height, width].

    Pixels that are interleaved in memory (RGBRGB...), as decoders return them, are resized faster, stay interleaved,
    and need no copy to be sent.
    """
    if tuple(frames.shape[-2:]) == size:
        return frames
    return transforms.resize(frames, list(size), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
