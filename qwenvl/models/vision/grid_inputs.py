"""Compute on the host the vision tower's inputs that depend only on image sizes, and its first layer as a matmul.

The stock towers read the sizes of the images from a tensor. On a GPU each read waits for all work queued before it, and
with SDPA every block reads them again. transformers accepts everything that follows from the sizes as precomputed
arguments (``transformers.vision_utils``). They are computed on the host, in training by the workers of the data loader,
and copied to the device without a wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from qwenvl.utils.devices import copy_to_device

Grids = Sequence[Sequence[int]]
"""(temporal, height, width) in patches of each image or video, Python numbers."""


class GridDescriber(Protocol):
    """Computes the arguments of a vision tower that depend on the sizes of images; it can be sent to a worker."""

    def describe(self, grids: Grids) -> dict[str, Any]:
        """Return the arguments, on the host; see :meth:`TowerGrids.describe`."""


@dataclass(frozen=True, slots=True)
class TowerGrids:
    """Settings of a stock vision tower that its inputs depend on, besides the sizes of images.

    Args:
        merge_size: Side of the square of patches that become one token.
        patch_size: Side of a patch in pixels.
        window_size: Side of the windows of Qwen2.5-VL in pixels; None without windows.
        interpolation: Options of the interpolation of learned position embeddings; None without such embeddings.
        varlen: Whether the attention takes all images in one call, with their boundaries on the device.
    """

    merge_size: int
    patch_size: int
    window_size: int | None
    interpolation: Mapping[str, Any] | None
    varlen: bool

    @classmethod
    def of(cls, visual: Any) -> TowerGrids:
        """Read the settings of a stock tower."""
        config, interpolation = visual.config, None
        if hasattr(visual, "num_grid_per_side"):
            interpolation = {
                "num_grid_per_side": visual.num_grid_per_side,
                "mode": visual.interpolation_mode,
                "align_corners": visual.interpolation_align_corners,
                "spatial_merge_size": config.spatial_merge_size,
            }
        window_size = getattr(config, "window_size", None)
        varlen = "flash" in config._attn_implementation  # the rule of transformers' is_flash_attention_requested
        return cls(config.spatial_merge_size, config.patch_size, window_size, interpolation, varlen)

    def describe(self, grids: Grids) -> dict[str, Any]:
        """Return the arguments of the tower that depend on the images' sizes alone.

        Args:
            grids: Sizes of the images and videos.

        Returns:
            ``grid_thw`` and, as far as the tower uses them, ``position_ids``, ``interp_indices``, ``interp_weights``,
            ``window_index``, ``cu_seqlens`` and ``cu_window_seqlens``, with their maxima where the attention is varlen.
            Tensors are for the device. Where the attention splits tensors by the boundaries ``cu_*``, these are arrays,
            which stay on the host.
        """
        sizes = torch.tensor([tuple(grid) for grid in grids])
        described = {"grid_thw": sizes, "position_ids": get_vision_position_ids(sizes, self.merge_size)}
        boundaries = {"cu_seqlens": get_vision_cu_seqlens(sizes)}
        if self.interpolation is not None:
            names = ("interp_indices", "interp_weights")
            found = get_vision_interpolation_indices_and_weights(sizes, **self.interpolation)
            described |= dict(zip(names, found, strict=True))
        if self.window_size is not None:
            described["window_index"], boundaries["cu_window_seqlens"] = get_vision_window_index(
                sizes, self.merge_size, self.window_size, self.patch_size
            )
        if not self.varlen:
            return described | {name: tensor.numpy() for name, tensor in boundaries.items()}
        longest = {
            name.replace("cu_", "max_").replace("seqlens", "seqlen"): int(tensor.diff().max())
            for name, tensor in boundaries.items()
        }
        return described | boundaries | longest


def grid_describer(visual: Any) -> GridDescriber:
    """Return what computes the inputs of a vision tower; a tower with a method ``grid_describer`` has its own."""
    own: GridDescriber = visual.grid_describer() if hasattr(visual, "grid_describer") else TowerGrids.of(visual)
    return own


def place_grids(described: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a result of ``describe`` to the device; make its arrays tensors that stay on the host."""

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copy_to_device(value, device)
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    return {name: placed(value) for name, value in described.items()}


def shown_grids(media: Sequence[Sequence[int]], merge_size: int) -> Grids:
    """Return the grids that the tower runs on: those of the media, or of a blank image of one token without media.

    Args:
        media: (frames, temporal, height, width) of each medium.
        merge_size: Side of the square of patches that become one token.
    """
    return [shape[1:] for shape in media] or [(1, merge_size, merge_size)]


class PatchProjection(nn.Conv3d):
    """The tower's first layer, a convolution without overlap between patches, computed as a matrix product.

    With some versions of torch and cuDNN the convolution is 10 times slower in bfloat16 or takes gigabytes more
    (github.com/pytorch/pytorch: 174051, 166122, 166643); the product is fast with all versions. It has the stock
    layer's parameters under the same names.

    Args:
        convolution: Stock layer.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        sizes: Any = convolution.kernel_size
        assert sizes == convolution.stride and not any(convolution.padding) and convolution.groups == 1, convolution
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            kernel_size=sizes,
            stride=sizes,
            bias=convolution.bias is not None,
            device="meta",
        )
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches [n, channels, time, height, width] to [n, features]."""
        return functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
