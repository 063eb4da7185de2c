"""QLoRA: frozen weights of the language model in 4 bits (Dettmers et al., 2023, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

_KEPT = ("model.visual", "lm_head")
"""Parts that stay as they are: the tower is small and sensitive, and the projection gives the loss."""


def quantization(bits: int) -> Any:
    """Return how transformers is to hold frozen weights, or None for 0 bits.

    Args:
        bits: 4 (NF4, its scales quantized once more, as in the paper) or 0.
    """
    if not bits:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(_KEPT),
    )
