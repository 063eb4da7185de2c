"""Images and videos of a micro-batch, as the model's forward pass takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qwenvl.models.vision.patchify import MediumShape


@dataclass(frozen=True, slots=True)
class VisionInputs:
    """All images and videos of a micro-batch.

    Args:
        pixels: uint8 [values], the frames of all media in the order of their tokens, in the layout of
            :class:`qwenvl.models.vision.patchify.Patchify`; None for text alone.
        media: Shape of each medium, Python numbers; empty for text alone.
        mask: bool [B, T], True at each image or video token.
        num_tokens: Number of image and video tokens, a Python number.
    """

    pixels: Tensor | None
    media: Sequence[MediumShape]
    mask: Tensor
    num_tokens: int
