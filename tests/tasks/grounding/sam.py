"""A tiny SAM with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import SamConfig, SamImageProcessor, SamModel

_SIDE = 64


def save_tiny_sam(folder: Path) -> Path:
    """Save a SAM for pictures of 64 x 64 pixels, with its processor; return the folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "image_size": _SIDE, "patch_size": 16}
    vision = {"output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_pos_feats": 8}
    config = SamConfig(
        vision_config={**sizes, **vision, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32},
        prompt_encoder_config={**sizes, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    sam = SamModel(config)
    with torch.no_grad():
        for parameter in sam.parameters():  # SAM's own are so small that nothing reaches a mask
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    sam.save_pretrained(folder)
    square = {"height": _SIDE, "width": _SIDE}
    SamImageProcessor(size={"longest_edge": _SIDE}, pad_size=square).save_pretrained(folder)
    return folder
