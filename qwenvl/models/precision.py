"""Data types of the weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from qwenvl.utils.errors import UserError


def resolve_dtype(model_dtype: str, *, bf16: bool, fp16: bool, masters: bool) -> torch.dtype:
    """Choose the data type of the weights in memory.

    With ``--bf16``, ``auto`` is bfloat16 if float32 copies of the trainable parameters exist (DeepSpeed's master
    weights, adapters), else float32: autocast computes in bfloat16 anyway, and AdamW on pure bfloat16 weights loses
    every update smaller than about 1/256 of the weight.

    Args:
        model_dtype: Value of ``--model_dtype``: ``auto``, ``float32`` or ``bfloat16``.
        bf16: Value of ``--bf16``.
        fp16: Value of ``--fp16``.
        masters: Whether float32 copies of the trainable parameters are kept elsewhere.

    Raises:
        UserError: An unknown name, or bfloat16 weights with ``--fp16``.
    """
    if model_dtype == "auto":
        return torch.bfloat16 if masters and bf16 else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if model_dtype not in known:
        raise UserError(f"--model_dtype {model_dtype!r} is not one of auto, {', '.join(known)}.")
    if fp16 and model_dtype == "bfloat16":
        raise UserError("--model_dtype bfloat16 does not go with --fp16. Use --bf16, or --model_dtype float32.")
    return known[model_dtype]


def read_dtype(
    model_name_or_path: str, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> torch.dtype:
    """Return the data type of a checkpoint's weights from its ``config.json``; float32 if none is given.

    Published checkpoints give it at the top of the file or in ``text_config``.
    """
    config = AutoConfig.from_pretrained(model_name_or_path, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    dtype: torch.dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return dtype
