"""Tiny training by every method that only a GPU has, or has differently."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.gpu_parts.base import (
    Part,
    Place,
    Row,
    emptied,
    flags,
    logged,
    noise,
    require_package,
    tiny_checkpoint,
    train,
)

_LORA = {
    "lora_enable": True,
    "lora_r": 8,
    "lora_alpha": 16,
    "tune_mm_llm": False,
    "tune_mm_mlp": False,
    "tune_mm_vision": False,
}
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "bf16": ({}, ""),
    "LoRA": (_LORA, ""),
    "QLoRA": ({**_LORA, "quantization_bit": 4}, "bitsandbytes"),
    "adamw_8bit": ({"optim": "adamw_8bit"}, "bitsandbytes"),
    "Liger": ({"use_liger_kernel": True}, "liger_kernel"),
    "torch_compile": ({"torch_compile": True}, ""),
    "sdpa": ({"attn_implementation": "sdpa"}, ""),
    "varlen": ({"attn_implementation": "varlen"}, "torch"),
    "flash_attention_2": ({"attn_implementation": "flash_attention_2"}, "flash_attn"),
    "flash_attention_3": ({"attn_implementation": "flash_attention_3"}, "flash_attn_interface"),
    "activation_offload": ({"activation_offload": True, "gradient_checkpointing": True}, ""),
}
"""Flags of each method, and the package that it needs on a GPU."""
_CLOSE = 0.05
"""Largest relative difference of a first loss from that of plain bf16."""


def train_by(place: Place, method: str) -> Row:
    """Train some steps; the first loss has to be that of plain bf16."""
    settings, package = METHODS[method]
    if package:
        place.require_cuda(method)
        require_package(package)
    registry = noise(place, "tiny", 16, 40, side=64)
    output = emptied(place.work / "methods" / method)
    train(flags(place, tiny_checkpoint(place, "qwen3_vl"), registry, output, bf16=True, **settings))
    losses = logged(output, "loss")
    row: Row = {"first_loss": losses[0], "last_loss": losses[-1]}
    plain = place.work / "methods" / "bf16"
    if (plain / "trainer_state.json").exists():
        row["from_bf16"] = abs(losses[0] / logged(plain, "loss")[0] - 1)
    return {**row, "passed": all(map(math.isfinite, losses)) and row.get("from_bf16", 0.0) < _CLOSE}


PART = Part(tuple(METHODS), train_by, together=4, rehearsed=("bf16", "LoRA", "QLoRA"))
