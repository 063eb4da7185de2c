"""Convert uint8 frames to the patches that a vision tower takes, on the training device.

Data loading sends resized uint8 frames. This module does what the checkpoint's own processors do after resizing:
rescale and normalise in float32, repeat an image (or the last frame of an odd number) to fill a temporal patch, and
cut patches in the order in which the tower merges them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl.utils.errors import UserError

MediumShape = Sequence[int]
"""(frames, temporal, height, width): frames of an image or video, and its grid in patches. Python numbers, so that
reading a shape does not wait for the device."""


class Patchify(nn.Module):
    """Cuts frames into patches. It has no parameters, and is not part of the model that is trained and saved.

    Args:
        patch_size: Side of a patch, in pixels.
        merge_size: Side of the square of patches that become one token; they are adjacent in the output.
        temporal_patch_size: Frames in one patch.
        mean: Mean of each colour channel, in units of 8-bit values.
        std: Standard deviation of each colour channel, in units of 8-bit values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, patch_size: int, merge_size: int, temporal_patch_size: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.temporal_patch_size = temporal_patch_size
        self.register_buffer("mean", mean.view(-1, 1), persistent=False)
        self.register_buffer("std", std.view(-1, 1), persistent=False)

    @classmethod
    def from_processor(cls, processor: Any) -> Patchify:
        """Read sizes, mean and standard deviation from a checkpoint's processor.

        Raises:
            UserError: The image and video processors normalise differently.
        """
        images, videos = processor.image_processor, processor.video_processor
        found = [_normalisation(part) for part in (images, videos)]
        if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
            raise UserError(
                "The checkpoint's image processor and video processor rescale or normalise pixels differently "
                "(image_mean, image_std, rescale_factor, do_rescale, do_normalize in its *processor_config.json), "
                "which no model of these families does. Copy the files of the original checkpoint into the folder."
            )
        return cls(images.patch_size, images.merge_size, images.temporal_patch_size, *found[0])

    def forward(self, pixels: Tensor, media: Sequence[MediumShape]) -> Tensor:
        """Cut frames into patches and normalise them.

        Args:
            pixels: uint8 [sum of frames x height x width x 3] in pixels, the frames of all media one after another,
                RGB interleaved.
            media: Shape of each medium.

        Returns:
            float32 [sum of patches, 3 x temporal x patch x patch], equal to the stock processors' output.
        """
        side = self.patch_size
        patches = pixels.new_empty(self.count_patches(media), 3, self.temporal_patch_size, side, side)
        used = done = 0
        for shape, group in itertools.groupby(tuple(shape) for shape in media):
            alike = [shape] * len(list(group))
            values, count = self.count_values(alike), self.count_patches(alike)
            self._cut(pixels[used : used + values], patches[done : done + count], shape)
            used, done = used + values, done + count
        normalised = patches.flatten(2).float().sub_(self.mean).div_(self.std)
        return normalised.flatten(1)

    def count_patches(self, media: Sequence[MediumShape]) -> int:
        """Return the number of patches of all media together."""
        return sum(temporal * height * width for _, temporal, height, width in media)

    def count_values(self, media: Sequence[MediumShape]) -> int:
        """Return the length of ``pixels`` that holds all media."""
        return sum(frames * height * width for frames, _, height, width in media) * 3 * self.patch_size**2

    def _cut(self, pixels: Tensor, patches: Tensor, shape: MediumShape) -> None:
        """Write the patches of consecutive media of one shape: [n x values] to [n x patches, 3, t, side, side]."""
        frames, temporal, height, width = shape
        side, merge, step = self.patch_size, self.merge_size, self.temporal_patch_size
        assert temporal == math.ceil(frames / step), shape
        rows, columns = height // merge, width // merge
        source = pixels.view(-1, frames, rows, merge, side, columns, merge, side, 3).permute(0, 1, 2, 5, 3, 6, 8, 4, 7)
        target = patches.view(-1, temporal, rows, columns, merge, merge, 3, step, side, side)
        for place in range(step):
            shown = source[:, place::step]
            target[:, : shown.shape[1], ..., place, :, :] = shown
            if shown.shape[1] < temporal:
                target[:, -1, ..., place, :, :] = source[:, -1]


def _normalisation(processor: Any) -> tuple[Tensor, Tensor]:
    """Return (mean, standard deviation) in units of 8-bit values, computed as the stock processors do."""
    mean, std = torch.zeros(3), torch.ones(3)
    if processor.do_normalize:
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    inverse = 1.0 / processor.rescale_factor if processor.do_rescale else 1.0
    return mean * inverse, std * inverse
