"""Quantized weights: those of QLoRA (Dettmers et al., 2023, arXiv 2305.14314), and checkpoints that come with some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from qwenvl.families import ModelLayout
from qwenvl.utils.errors import UserError


def quantization(bits: int, layout: ModelLayout) -> Any:
    """Return how transformers is to hold frozen weights, or None for 0 bits.

    The tower stays as it is, as it is small and sensitive, and so does the projection, which gives the loss.

    Args:
        bits: 4 (NF4, its scales quantized once more, as in the paper) or 0.
        layout: Where the model has its parts.
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
    """Return how the weights of a checkpoint are quantized, such as ``awq``; an empty string where they are not.

    Args:
        config: Its ``config.json``. Composite models have ``quantization_config`` at the top or in ``text_config``.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    given = config.get("quantization_config") or nested
    if not given:
        return ""
    known = given if isinstance(given, Mapping) else {}
    by_bits = "bitsandbytes" if known.get("load_in_4bit") or known.get("load_in_8bit") else "unknown method"
    return str(known.get("quant_method") or by_bits)


def refuse_quantized(config: Mapping[str, Any], named: str) -> None:
    """Refuse a checkpoint whose weights are quantized, where they are to be trained or merged into.

    Args:
        config: Its ``config.json``.
        named: The flag and the checkpoint, for the message.

    Raises:
        UserError: They are.
    """
    method = quantization_method(config)
    if method:
        raise UserError(
            f"{named}: its weights are quantized ({method}, says quantization_config of its config.json), and can "
            "neither be trained nor merged into. Name the unquantized checkpoint of the same model (below adapters, by "
            "--base); with --lora_enable True --quantization_bit 4 its frozen weights take 4 bits in training (QLoRA)."
        )
