"""A small U-Net from a stack of attention maps to a mask, and the loss of masks.

As in F-LMM (Wu et al., arXiv 2406.05821, section 3.3, and ``configs`` of github.com/wusize/F-LMM): every map is divided
by its sum, so that only the distribution of attention matters, not its amount; small maps are upsampled; four stages of
two 3 x 3 convolutions with group norm of one group, 64 channels in the first stage, doubled in each further one. Group
norm is computed per sample, so a mask does not depend on the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Convolutions(nn.Sequential):
    """Two 3 x 3 convolutions, each with group norm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(1, outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(1, outputs), nn.ReLU()),
        )


class _Up(nn.Module):
    """Upsample by 2, and join with the states of the same size from the way down (skip connection)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(inputs, outputs, 1)
        self.join = _Convolutions(2 * outputs, outputs)

    def forward(self, low: Tensor, skipped: Tensor) -> Tensor:
        finer = functional.interpolate(self.narrow(low), scale_factor=2, mode="bilinear")
        joined: Tensor = self.join(torch.cat([skipped, finer], dim=1))
        return joined


class MaskUNet(nn.Module):
    """U-Net from attention maps to the logits of a mask.

    Args:
        maps: Number of attention maps: layers x heads.
        channels: Channels of the first stage.
        stages: Number of stages, each with half the resolution of the one before.
        seed: Seed of the weights, which are independent of the global random state.
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
            maps: [n, maps, h, w], attention weights of 0 or more.
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
    """Return the loss of a mask: mean binary cross entropy over its cells, plus Dice loss.

    Dice: 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), as in F-LMM (``naive_dice`` of mmdet with eps 1).

    Args:
        logits: [height, width].
        target: [height, width], the share of each cell that the mask covers, 0 to 1.

    Returns:
        float32 [].
    """
    logits, target = logits.float(), target.float()
    chances = logits.sigmoid()
    dice = 1 - (2 * (chances * target).sum() + 1) / (chances.sum() + target.sum() + 1)
    return functional.binary_cross_entropy_with_logits(logits, target) + dice
