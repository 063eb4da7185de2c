"""Compute on the host the vision tower's inputs that depend only on image sizes, and its first layer as a matmul.

The stock towers read the sizes of the images from a tensor. On a GPU each read waits for all work queued before it, and
with SDPA every block reads them again. transformers accepts everything that follows from the sizes as precomputed
arguments (``transformers.vision_utils``). Computed on the host, where the sizes are known, they are copied to the
device without a wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


def describe_grids(visual: PreTrainedModel, grids: Sequence[Sequence[int]], device: torch.device) -> dict[str, Any]:
    """Return the arguments of a stock vision tower that depend on the images' sizes alone.

    Args:
        visual: Vision tower.
        grids: (temporal, height, width) in patches of each image or video, Python numbers.
        device: Device of the tower.

    Returns:
        ``grid_thw`` and, as far as the tower uses them, ``position_ids``, ``interp_indices``, ``interp_weights``,
        ``window_index``, ``cu_seqlens`` and ``cu_window_seqlens`` with their maxima. All are on the device, except that
        the boundaries ``cu_*`` stay on the host if the attention splits tensors by them. A tower with a method
        ``describe_grids`` chooses its own arguments.
    """
    if hasattr(visual, "describe_grids"):
        own: dict[str, Any] = visual.describe_grids(grids, device)
        return {"grid_thw": _to_device(torch.tensor([tuple(grid) for grid in grids]), device), **own}
    config: Any = visual.config
    on_host = torch.tensor([tuple(grid) for grid in grids])
    flash = config._attn_implementation.startswith("flash")
    borders = {"cu_seqlens": get_vision_cu_seqlens(on_host)}
    moved = {"grid_thw": on_host, "position_ids": get_vision_position_ids(on_host, config.spatial_merge_size)}
    if hasattr(visual, "num_grid_per_side"):  # position embeddings that are learned for one grid, and resampled
        moved["interp_indices"], moved["interp_weights"] = get_vision_interpolation_indices_and_weights(
            on_host,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=config.spatial_merge_size,
        )
    if hasattr(config, "window_size"):
        moved["window_index"], borders["cu_window_seqlens"] = get_vision_window_index(
            on_host, config.spatial_merge_size, config.window_size, config.patch_size
        )
    described: dict[str, Any] = {name: _to_device(tensor, device) for name, tensor in moved.items()}
    for name, tensor in borders.items():
        described[name] = _to_device(tensor, device) if flash else tensor
        if flash:
            described[name.replace("cu_", "max_").replace("seqlens", "seqlen")] = int(tensor.diff().max())
    return described


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device from pinned memory; an ordinary copy would wait for all earlier work."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
