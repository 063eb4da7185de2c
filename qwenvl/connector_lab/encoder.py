"""A common interface to stock vision encoders: patches of images in, one feature per patch out, in the same order.

CLIP and SigLIP take whole images, which are reassembled from their patches; consecutive images of one size share a
call. Their learned positions are interpolated by transformers for images of another size than the encoder was trained
on. The towers of Qwen2-VL and Qwen3-VL take patches; their own mergers and deepstack are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from qwenvl.connector_lab.config import LabVisionConfig
from qwenvl.connector_lab.connectors import Sizes
from qwenvl.utils.errors import UserError

IMAGE_ENCODERS = ("clip_vision_model", "siglip_vision_model")
TOWERS = ("qwen2_vl_vision", "qwen3_vl_vision")
"""``model_type`` of the supported encoders."""


def build_encoder(config: LabVisionConfig) -> PreTrainedModel:
    """Return the encoder that a config names, with random weights, without parts that the connector does not use.

    Raises:
        UserError: the encoder is not supported.
    """
    encoder_config = config.encoder_config
    kind = encoder_config.model_type
    if kind not in (*IMAGE_ENCODERS, *TOWERS):
        raise UserError(
            f"model_type {kind!r} of the vision encoder is not one the lab knows: "
            f"{', '.join((*IMAGE_ENCODERS, *TOWERS))}."
        )
    if kind in IMAGE_ENCODERS:
        if kind == "siglip_vision_model":
            encoder_config.vision_use_head = False  # the pooling head
        encoder: Any = AutoModel.from_config(encoder_config)
        if kind == "clip_vision_model":
            encoder.post_layernorm = nn.Identity()  # applies to the class token, which is dropped
        return encoder
    encoder_config.spatial_merge_size = config.spatial_merge_size  # determines the order of its patches
    if kind == "qwen3_vl_vision":
        encoder_config.deepstack_visual_indexes = []
    encoder = _tower_class(kind)._from_config(encoder_config)
    encoder.merger = nn.Identity()
    return encoder


def _tower_class(kind: str) -> Any:
    """Return the class of a tower; ``AutoModel`` does not know the one of Qwen2-VL."""
    if kind == "qwen3_vl_vision":
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        return Qwen3VLVisionModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    return Qwen2VisionTransformerPretrainedModel


def encode_patches(
    encoder: Any, config: LabVisionConfig, patches: Tensor, grids: Tensor, sizes: Sizes, **described: Any
) -> Tensor:
    """Return the encoder's features.

    Args:
        encoder: Encoder from :func:`build_encoder`.
        config: Config of encoder and connector.
        patches: [n, channels x frames x patch x patch], as the processor cuts them.
        grids: int64 [images, 3], (temporal, height, width) of each in patches.
        sizes: Sizes from :func:`frame_sizes`.
        described: Inputs that a tower would otherwise compute from the grids.

    Returns:
        [n, encoder width], in the order of the patches.
    """
    if encoder.config.model_type in TOWERS:
        features: Tensor = encoder(patches, grid_thw=grids, **described).last_hidden_state
        return features
    made, used = [], 0
    for size, group in itertools.groupby(sizes):
        count = len(list(group))
        values = count * size[0] * size[1]
        images = _to_images(patches[used : used + values], count, size, config)
        made.append(_to_patch_order(_features_of(encoder, images), count, size, config.spatial_merge_size))
        used += values
    return torch.cat(made)


def frame_sizes(grids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return (height, width) in patches of each image, and of each temporal step of each video.

    Args:
        grids: (temporal, height, width) of each image or video in patches.
    """
    return [(height, width) for temporal, height, width in grids for _ in range(temporal)]


def _features_of(encoder: Any, images: Tensor) -> Tensor:
    """Return the features of the patches of images [n, 3, height, width], row by row, without a class token."""
    patch = encoder.config.patch_size
    count = (images.shape[2] // patch) * (images.shape[3] // patch)
    hidden: Tensor = encoder(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    return hidden[:, hidden.shape[1] - count :]


def _to_images(patches: Tensor, count: int, size: tuple[int, int], config: LabVisionConfig) -> Tensor:
    """Return images [count, 3, height, width] in pixels, reassembled from their patches."""
    merge, side = config.spatial_merge_size, config.patch_size
    rows, columns = size[0] // merge, size[1] // merge
    cut = patches.reshape(count, rows, columns, merge, merge, config.in_channels, side, side)
    lines = cut.permute(0, 5, 1, 3, 6, 2, 4, 7)  # channel; rows of blocks, patches, pixels; then the same of columns
    return lines.reshape(count, config.in_channels, size[0] * side, size[1] * side)


def _to_patch_order(features: Tensor, count: int, size: tuple[int, int], merge: int) -> Tensor:
    """Return features [count, height x width, C] that are row by row in the order of the patches: [n, C]."""
    blocks = features.reshape(count, size[0] // merge, merge, size[1] // merge, merge, -1)
    return blocks.transpose(2, 3).reshape(-1, features.shape[-1])
