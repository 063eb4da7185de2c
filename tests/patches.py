"""Frames to patches, by the trainer's own way for what data loading sends; and patches to frames, for oracles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from qwenvl.data.collator import Collator
from qwenvl.data.encoding.encoded import EncodedSample, Item
from qwenvl.models import forward as vision
from qwenvl.models.vision.patchify import Patchify


@functools.cache
def patchify_of(folder: Path | str) -> Patchify:
    """What makes patches for the checkpoint in a folder."""
    return Patchify.from_processor(AutoProcessor.from_pretrained(folder))


def install(model: PreTrainedModel) -> vision.Installed:
    """Install the vision call and the loss into a model loaded from a folder."""
    return vision.install(model, patchify_of(model.config._name_or_path))


def patches_of(sample: EncodedSample, folder: Path) -> Tensor:
    """Return float32 [patches, values], what the vision tower is given for a sample that has media."""
    batch = Collator(0, flatten=False)([Item((sample,))])
    patches: Tensor = patchify_of(folder)(batch["pixels"], batch["media"])
    return patches


def grids_of(sample: EncodedSample) -> list[list[int]]:
    """Return (temporal, height, width) of each medium, in patches."""
    return [list(medium.grid) for medium in sample.media]


def frames_of(patches: Tensor, grid: Sequence[int], processor: Any) -> Tensor:
    """Undo what a stock image or video processor does after resizing: uint8 [frames, height, width, 3], interleaved."""
    temporal, height, width = grid
    side, merge, step = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    values = patches.view(temporal, height // merge, width // merge, merge, merge, 3, step, side, side)
    frames = values.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(temporal * step, height * side, width * side, 3)
    frames = (frames * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)) * 255
    assert (frames - frames.round()).abs().max() < 1e-2
    return frames.round().to(torch.uint8)
