"""Quantized weights: QLoRA (Dettmers et al., 2023, arXiv 2305.14314), and checkpoints published with quantization."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qwenvl.families import FAMILIES, ModelLayout
from qwenvl.utils.errors import UserError

SCALES = "_scale_inv"
"""End of the name of the scales of an FP8 weight, after the weight's own name."""


def quantization(bits: int, layout: ModelLayout) -> Any:
    """Return the quantization config for frozen weights, or None for 0 bits.

    The vision tower, which is small and sensitive, and the vocabulary projection, which gives the loss, are not
    quantized.

    Args:
        bits: 4 (NF4 with double quantization, as in the paper) or 0.
        layout: Paths of the model's submodules.
    """
    if not bits:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[layout.vision, layout.head],
    )


def quantization_method(config: Mapping[str, Any]) -> str:
    """Return the quantization method of a checkpoint, such as ``awq``; an empty string if it is not quantized.

    Args:
        config: Contents of ``config.json``. Composite models have ``quantization_config`` at the top or in
            ``text_config``.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    given = config.get("quantization_config") or nested
    if not given:
        return ""
    known = given if isinstance(given, Mapping) else {}
    by_bits = "bitsandbytes" if known.get("load_in_4bit") or known.get("load_in_8bit") else "unknown method"
    return str(known.get("quant_method") or by_bits)


def refuse_quantized(config: Mapping[str, Any], named: str, *, adapted: bool = False) -> None:
    """Refuse a checkpoint with quantized weights that cannot be trained or merged into.

    Args:
        config: Contents of ``config.json``.
        named: Flag and checkpoint, for the message.
        adapted: Whether adapters train while its own weights stay frozen; FP8 is dequantized for them.

    Raises:
        UserError: The weights are quantized in such a way.
    """
    method = quantization_method(config)
    if not method or (adapted and is_fp8(config)):
        return
    found = f"{named}: its weights are quantized ({method}, says quantization_config of its config.json)"
    if is_fp8(config):
        raise UserError(
            f"{found}, which cannot be trained themselves. Train adapters on them, dequantized, by --lora_enable True "
            "(and --tune_mm_llm False); or name the unquantized checkpoint of the same model."
        )
    raise UserError(
        f"{found}, and can neither be trained nor merged into. Name the unquantized checkpoint of the same model "
        "(below adapters, by --base); with --lora_enable True --quantization_bit 4 its frozen weights take 4 bits in "
        "training (QLoRA)."
    )


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a dense checkpoint is quantized like Qwen's published FP8: each block of a weight has a scale.

    Args:
        config: Contents of ``config.json``.
    """
    given, family = config.get("quantization_config") or {}, FAMILIES.get(str(config.get("model_type")))
    dense = family is not None and not family.moe
    return dense and quantization_method(config) == "fp8" and bool(given.get("weight_block_size"))


def dequantizing(config: PreTrainedConfig, own: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a config with which ``from_pretrained`` dequantizes FP8 on any device; other configs are not changed.

    Args:
        config: Config to build the model from; one from a folder of adapters lacks the base's quantization.
        own: Contents of the checkpoint's ``config.json``.
    """
    if not is_fp8(own):
        return config
    config = copy.deepcopy(config)
    config.quantization_config = {**own["quantization_config"], "dequantize": True}
    return config


def finish_dequantizing(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a dequantized model to one data type, and have it saved without quantization.

    transformers leaves weights that were not quantized in the type of the files, and would quantize again on saving.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model._weight_conversions = [one for one in getattr(model, "_weight_conversions", None) or () if not _fp8_rule(one)]


def _fp8_rule(conversion: Any) -> bool:
    return any(isinstance(one, Fp8Dequantize) for one in getattr(conversion, "operations", None) or ())


def dequantize(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that FP8 values and their scales stand for, rounded once, as transformers does.

    Args:
        weight: FP8 [rows, columns].
        scales: Floating-point scale of each block, [rows / block rows, columns / block columns].
        dtype: Data type of the result.
    """
    for dim, (size, count) in enumerate(zip(weight.shape, scales.shape, strict=True)):
        scales = scales.repeat_interleave(size // count, dim)
    return (weight.float() * scales.float()).to(dtype)


def require_whole_blocks(files: Sequence[str], block: Sequence[int], named: str) -> None:
    """Check that FP8 weights are divided into whole blocks; with others, transformers infers a wrong block size.

    Args:
        files: Weight files of the checkpoint.
        block: (rows, columns) of a block.
        named: Flag and checkpoint, for the message.

    Raises:
        UserError: A weight is not divided into whole blocks.
    """
    for file in files:
        with safe_open(file, "pt") as tensors:
            for scales in (name for name in tensors.keys() if name.endswith(SCALES)):  # noqa: SIM118  not a dict
                weight = scales.removesuffix(SCALES)
                shape, grid = (tensors.get_slice(name).get_shape() for name in (weight, scales))
                if not all(_whole(*sizes) for sizes in zip(shape, grid, block, strict=True)):
                    raise UserError(
                        f"{named}: {scales} has {grid} scales for a weight of {shape}, which transformers would not "
                        f"dequantize in blocks of {list(block)}. Name the unquantized checkpoint of the same model."
                    )


def _whole(size: int, scales: int, block: int) -> bool:
    """Whether a dimension is divided into whole blocks, or is at most one block."""
    return (scales == 1 and size <= block) or size == scales * block
