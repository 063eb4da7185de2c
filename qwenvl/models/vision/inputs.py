"""Images and videos of a micro-batch, as the model's forward pass takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qwenvl.models.vision.patchify import MediumShape


@dataclass(frozen=True, slots=True)
class VisionInputs:
    """All images and videos of a micro-batch.

    Args:
        pixels: uint8 [values], the frames of all media in the order of their tokens, in the layout of
            :class:`qwenvl.models.vision.patchify.Patchify`; None for text alone.
        media: Shape of each medium, Python numbers; empty for text alone.
        rows: int64 [tokens], index of each image or video token in the flattened rows [B x T], ascending.
        grids: Result of :meth:`qwenvl.models.vision.grid_inputs.TowerGrids.describe` for the media; None to compute it
            when the tower is called.
    """

    pixels: Tensor | None
    media: Sequence[MediumShape]
    rows: Tensor
    grids: Mapping[str, Any] | None = None
