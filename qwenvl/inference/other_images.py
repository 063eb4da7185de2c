"""The same questions with blank images, and with those of other samples.

Blank is mid grey. Blank and other images have the size, and videos the number of frames, of those they stand for, so
that tokens and positions are the same and only pixels differ. Each sample gets the images of one other sample, which
shares none with it: of its own dataset where that has one, else of any. Which one is seeded.
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
"""Of a blank picture, 0 to 255: near the mean that pixels are normalised by, so near nothing for the model."""

Key = tuple[int, int | None]
"""Row and member of a sample."""


def blank(frames: Tensor) -> Tensor:
    """Return a blank picture or video of the same shape: uint8 [frames, height, width, 3]."""
    return torch.full_like(frames, GREY)


def fitted(frames: Tensor, like: Tensor) -> Tensor:
    """Return a picture or video in the shape of another: frames spread evenly from first to last, then resized.

    Args:
        frames: uint8 [n, height, width, 3].
        like: uint8 of the wanted shape.
    """
    chosen = torch.linspace(0, len(frames) - 1, len(like)).round().long()
    pixels = frames[chosen].permute(0, 3, 1, 2)
    resized = transforms.resize(
        pixels, list(like.shape[1:3]), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
    )
    return resized.permute(0, 2, 3, 1).contiguous()


def key_of(line: Prediction) -> Key:
    """Return which sample a line is about."""
    return line.index, line.member


def find_partners(lines: Sequence[Prediction], seed: int = 0) -> dict[Key, Key]:
    """Return, for each sample with media, the sample whose media it gets; none for one without a partner.

    Args:
        lines: of all samples; those without media or with an error take no part.
        seed: of the choice.
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
    """Pair the samples of a group with others, each with one of its own as far as that is possible.

    Samples of the same media stand together; moved by as many places as the largest such family has members, everyone
    meets another family, unless one has more than half of all.
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
