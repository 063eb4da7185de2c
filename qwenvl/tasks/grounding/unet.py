"""A small U-Net from a stack of attention maps to a mask, and the loss of masks.

As in F-LMM (Wu et al., arXiv 2406.05821, section 3.3, and ``configs`` of github.com/wusize/F-LMM): every map is divided
by its sum, so that it counts where a phrase looks and not how much; maps of few tokens are made finer; four stages of
two 3 x 3 convolutions with group norm of one group, 64 channels in the first and twice as many in each after it. Group
norm sees one picture at a time, so that a mask does not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Convolutions(nn.Sequential):
    """Two 3 x 3 convolutions, each with norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(1, outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(1, outputs), nn.ReLU()),
        )


class _Up(nn.Module):
    """Twice as fine, and joined with what the same size was on the way down."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(inputs, outputs, 1)
        self.join = _Convolutions(2 * outputs, outputs)

    def forward(self, low: Tensor, skipped: Tensor) -> Tensor:
        finer = functional.interpolate(self.narrow(low), scale_factor=2, mode="bilinear")
        joined: Tensor = self.join(torch.cat([skipped, finer], dim=1))
        return joined


class MaskUNet(nn.Module):
    """Maps to logits of a mask.

    Args:
        maps: how many there are: layers x heads.
        channels: of the first stage.
        stages: sizes that are worked on, each half as fine as the one before.
        seed: of the weights, which do not depend on what was drawn before.
    """

    def __init__(self, maps: int, channels: int = 64, stages: int = 4, seed: int = 0) -> None:
        super().__init__()
        widths = [channels << stage for stage in range(stages)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.down = nn.ModuleList(_Convolutions(a, b) for a, b in zip([maps, *widths[:-1]], widths, strict=True))
            self.up = nn.ModuleList(_Up(b, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True))
            self.classify = nn.Conv2d(channels, 1, 1)

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Return logits [n, height, width].

        Args:
            maps: [n, maps, h, w], weights of 0 or more.
            size: (height, width) of the mask, at least that of the maps.
        """
        weights = maps / maps.sum((-2, -1), keepdim=True).clamp(min=1e-12)
        states = functional.interpolate(weights, size=size, mode="bilinear")
        multiple = 1 << len(self.up)
        states = functional.pad(states, (0, -size[1] % multiple, 0, -size[0] % multiple))
        seen: list[Tensor] = []
        for number, stage in enumerate(self.down):
            states = stage(functional.max_pool2d(states, 2) if number else states)
            seen.append(states)
        for stage, skipped in zip(self.up, seen[-2::-1], strict=True):
            states = stage(states, skipped)
        logits: Tensor = self.classify(states)
        return logits[:, 0, : size[0], : size[1]]


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the loss of a mask: mean binary cross entropy of its cells, plus Dice loss.

    Dice: 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), as F-LMM takes it (``naive_dice`` of mmdet with eps 1).

    Args:
        logits: [height, width].
        target: the same shape, 0 to 1: how much of each cell belongs to the mask.

    Returns:
        float32 [].
    """
    logits, target = logits.float(), target.float()
    chances = logits.sigmoid()
    dice = 1 - (2 * (chances * target).sum() + 1) / (chances.sum() + target.sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, target) + dice
