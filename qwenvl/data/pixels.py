"""Pixels through the checkpoint's own image and video processors, at the sizes planned from the headers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torchvision.transforms.v2 import functional as transforms

from qwenvl.data.sizes import ImagePlan, MediaPlan, VideoPlan
from qwenvl.data.types import ImageItem, VideoItem


class FrameReader(Protocol):
    """The part of :class:`qwenvl.data.media.MediaReader` that decodes."""

    def read_image(self, item: ImageItem) -> Image:
        """Decode an image to RGB."""

    def read_frames(self, item: VideoItem, indices: np.ndarray) -> torch.Tensor:
        """Decode frames of a video: uint8 [n, 3, height, width]."""


class PixelProcessor:
    """Makes patches of pictures and videos.

    Args:
        processor: the checkpoint's processor; its mean, standard deviation and patch sizes are used as they are.
    """

    def __init__(self, processor: Any) -> None:
        self._image_processor = processor.image_processor
        self._video_processor = processor.video_processor

    def __call__(self, plan: MediaPlan, reader: FrameReader) -> torch.Tensor:
        """Return float32 [patches, channels x temporal x patch x patch], normalised, in the order of the tokens.

        Raises:
            SampleError: the file cannot be decoded.
        """
        patches = self._image(plan, reader) if isinstance(plan, ImagePlan) else self._video(plan, reader)
        assert patches.shape[0] == plan.grid[0] * plan.grid[1] * plan.grid[2], (patches.shape, plan)
        return patches

    def _image(self, plan: ImagePlan, reader: FrameReader) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(reader.read_image(plan.item))).permute(2, 0, 1)
        result = self._image_processor(images=[_resize(pixels, plan.resized)], do_resize=False, return_tensors="pt")
        patches: torch.Tensor = result["pixel_values"]
        return patches

    def _video(self, plan: VideoPlan, reader: FrameReader) -> torch.Tensor:
        frames = _resize(reader.read_frames(plan.item, plan.indices), plan.resized)
        # Frames are sampled and resized here, once; the processor normalises them and cuts patches.
        options: dict[str, Any] = {"do_resize": False, "do_sample_frames": False, "return_tensors": "pt"}
        if hasattr(self._video_processor, "cap_pixels_per_frame"):
            options["cap_pixels_per_frame"] = False
        patches: torch.Tensor = self._video_processor(videos=[frames], **options)["pixel_values_videos"]
        return patches


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize uint8 [..., height, width] as the processors do: bicubic with antialiasing, on integers."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return transforms.resize(pixels, list(size), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
