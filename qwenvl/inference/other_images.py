"""The same questions with blank images, and with the images of other samples.

Blank is mid grey. Replacements have the size, and videos the number of frames, of the original, so that tokens and
positions are the same and only pixels differ. Each sample gets the images of one other sample that shares no image
with it: from its own dataset if possible, else from any. The choice is seeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from qwenvl.metrics.predictions import Prediction

View = Literal["shown", "blank", "swapped"]
VIEWS: tuple[View, ...] = ("shown", "blank", "swapped")
GREY = 128
"""Value of the pixels of a blank image, 0 to 255: near the normalisation mean, so near 0 for the model."""

Key = tuple[int, int | None]
"""Row and member of a sample."""


def blank(frames: Tensor) -> Tensor:
    """Return a blank image or video of the same shape: uint8 [frames, height, width, 3]."""
    return torch.full_like(frames, GREY)


def fitted(frames: Tensor, like: Tensor) -> Tensor:
    """Return an image or video in the shape of another: evenly spaced frames, from first to last, resized.

    Args:
        frames: uint8 [n, height, width, 3].
        like: uint8 [frames, height, width, 3] of the wanted shape.
    """
    chosen = torch.linspace(0, len(frames) - 1, len(like)).round().long()
    pixels = frames[chosen].permute(0, 3, 1, 2)
    resized = transforms.resize(
        pixels, list(like.shape[1:3]), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
    )
    return resized.permute(0, 2, 3, 1).contiguous()


def key_of(line: Prediction) -> Key:
    """Return the key of a line's sample."""
    return line.index, line.member


def find_partners(lines: Sequence[Prediction], seed: int = 0) -> dict[Key, Key]:
    """Return, for each sample with media, the sample whose media it gets; samples without a partner are left out.

    Args:
        lines: Lines of all samples; lines without media or with an error are ignored.
        seed: Seed of the choice.
    """
    able = [line for line in lines if line.error is None and line.media]
    partners: dict[Key, Key] = {}
    for of_dataset in (True, False):
        groups: dict[Any, list[Prediction]] = {}
        for line in able:
            kinds = tuple(sorted({kind for kind, _ in line.media}))
            groups.setdefault((kinds, line.dataset) if of_dataset else kinds, []).append(line)
        for group in groups.values():
            partners = _rotated(group, seed) | partners
    return partners


def _rotated(group: Sequence[Prediction], seed: int) -> dict[Key, Key]:
    """Give each sample of a group a different partner, as far as possible.

    Samples with the same media (a family) are adjacent. Shifting the order by the size of the largest family pairs
    each sample with one of another family, unless one family has more than half of all samples.
    """
    families: dict[Any, list[Prediction]] = {}
    for line in group:
        families.setdefault(line.media, []).append(line)
    order = np.random.default_rng([seed, len(group)]).permutation(len(families))
    ordered = [line for place in order for line in list(families.values())[place]]
    shift, count = max(map(len, families.values())), len(ordered)
    pairs: dict[Key, Key] = {}
    for place, line in enumerate(ordered):
        turns = (ordered[(place + shift + step) % count] for step in range(count))
        other = next((one for one in turns if not set(one.media) & set(line.media)), None)
        if other is not None:
            pairs[key_of(line)] = key_of(other)
    return pairs
