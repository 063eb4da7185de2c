"""Shapes of the tiny models: the same settings as in the real family, with smaller widths and depths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from qwenvl.families import get_family

Size = Literal["tiny", "demo"]

# Small Qwen models share the embedding matrix with the output projection, large ones and the mixtures do not.
TIED_FAMILIES = ("qwen2_vl", "qwen3_vl", "qwen3_5")
VOCABULARY_MULTIPLE = 64  # as in real checkpoints, the matrix has more rows than the tokenizer has entries


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and depths of one model.

    Args:
        hidden_size: Width of the language model.
        intermediate_size: Width of the language model's feed-forward layers.
        num_hidden_layers: Number of layers of the language model.
        num_attention_heads: Query heads of the language model; there are half as many key and value heads.
        head_dim: Width of a head.
        mrope_section: Rotary frequencies of the temporal, height and width positions; their sum is half of the
            rotated part of a head.
        vision_hidden_size: Width of the vision tower.
        vision_intermediate_size: Width of the vision tower's feed-forward layers.
        vision_depth: Number of layers of the vision tower.
        vision_num_heads: Attention heads of the vision tower.
        num_position_embeddings: Entries of the vision tower's learned position grid, a square number.
        initializer_range: Standard deviation of the random weights; far above the usual 0.02, which in narrow layers
            would make every output nearly independent of its input.
    """

    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 3  # one more than deepstack has levels: the last one enters before the last layer
    num_attention_heads: int = 4
    head_dim: int = 16
    mrope_section: tuple[int, int, int] = (4, 2, 2)
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 64
    vision_depth: int = 3
    vision_num_heads: int = 2
    num_position_embeddings: int = 256
    initializer_range: float = 0.1


TINY = Shape()
DEMO = Shape(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    head_dim=32,
    mrope_section=(6, 5, 5),
    vision_hidden_size=128,
    vision_intermediate_size=384,
    vision_depth=4,
    vision_num_heads=4,
    initializer_range=0.05,
)


def build_config(family: str, tokenizer: PreTrainedTokenizerBase, size: Size = "tiny") -> PreTrainedConfig:
    """Return the configuration of a tiny model.

    Args:
        family: ``model_type`` of the checkpoint.
        tokenizer: Tokenizer of the checkpoint; it gives the vocabulary size and the ids of special tokens.
        size: ``tiny`` for tests, ``demo`` for a model that can learn.
    """
    shape = TINY if size == "tiny" else DEMO
    if get_family(family).linear_attention:  # a quarter of each head is rotated, so heads must be wider
        head_dim = 2 * shape.head_dim
        shape = replace(shape, head_dim=head_dim, mrope_section=_section(head_dim // 4), num_hidden_layers=4)
    tied = family in TIED_FAMILIES
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    return CONFIG_MAPPING[family](
        text_config=_text_settings(family, shape, tokenizer) | {"tie_word_embeddings": tied},
        vision_config=_vision_settings(family, shape),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def _section(rotary_dim: int) -> tuple[int, int, int]:
    """Return the M-RoPE section of a rotated width, near Qwen3-VL's 24, 20, 20 of 128."""
    third = rotary_dim // 2 // 3
    return rotary_dim // 2 - 2 * third, third, third


def _text_settings(family: str, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the language model's settings. ``pad_token_id`` is left out: it breaks building under ZeRO-3."""
    settings: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_attention_heads // 2,
        "initializer_range": shape.initializer_range,
        "max_position_embeddings": 32768,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": list(shape.mrope_section),
        },
    }
    if family != "qwen3_5_moe":  # each of its layers is a mixture of experts
        settings["intermediate_size"] = shape.intermediate_size
    if not family.startswith("qwen2"):
        settings["head_dim"] = shape.head_dim
        settings["rope_parameters"] |= {"mrope_interleaved": True, "rope_theta": 5_000_000.0}
    if get_family(family).linear_attention:
        settings["rope_parameters"] |= {"partial_rotary_factor": 0.25, "rope_theta": 10_000_000.0}
        settings |= _linear_attention_settings(shape)
    if get_family(family).mtp:
        # the model's end of sequence is not the tokenizer's; generation_config.json names both
        settings |= {"mtp_num_hidden_layers": 1, "eos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    if get_family(family).moe:
        settings |= _moe_settings(family, shape)
    return settings


def _linear_attention_settings(shape: Shape) -> Mapping[str, Any]:
    """Return the gated delta layers of Qwen3.5; every fourth layer is full attention, as in the real ones."""
    return {
        "layer_types": ["full_attention" if n % 4 == 3 else "linear_attention" for n in range(shape.num_hidden_layers)],
        "mamba_ssm_dtype": "float32",
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }


def _moe_settings(family: str, shape: Shape) -> Mapping[str, Any]:
    """Return the experts' settings; 2 x width differs from the hidden size, so that no transposed tensor can load."""
    width = 3 * shape.hidden_size // 8
    settings: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    if family == "qwen3_5_moe":
        settings["shared_expert_intermediate_size"] = width
    return settings


def _vision_settings(family: str, shape: Shape) -> dict[str, Any]:
    """Return the vision tower's settings; patch, merge and window sizes are the real ones."""
    settings: dict[str, Any] = {
        "depth": shape.vision_depth,
        "num_heads": shape.vision_num_heads,
        "initializer_range": shape.initializer_range,
        "patch_size": 14 if family.startswith("qwen2") else 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family == "qwen2_vl":  # here ``hidden_size`` is the width after the merger
        return settings | {"embed_dim": shape.vision_hidden_size, "hidden_size": shape.hidden_size, "mlp_ratio": 2}
    settings |= {
        "hidden_size": shape.vision_hidden_size,
        "intermediate_size": shape.vision_intermediate_size,
        "out_hidden_size": shape.hidden_size,
    }
    if family == "qwen2_5_vl":
        middle, last = shape.vision_depth // 2, shape.vision_depth - 1
        return settings | {"window_size": 112, "fullatt_block_indexes": [middle, last], "tokens_per_second": 2}
    settings["num_position_embeddings"] = shape.num_position_embeddings
    if family.startswith("qwen3_vl"):
        settings["deepstack_visual_indexes"] = list(range(min(shape.vision_depth - 1, shape.num_hidden_layers)))
    return settings
