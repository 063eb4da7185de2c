"""Flags of the checkpoint: its trained parts and how it is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from qwenvl.utils.errors import UserError


@dataclass
class ModelArguments:
    """The checkpoint and its trained parts. Every field is explained by its ``help``.

    Raises:
        UserError: values that contradict each other or are out of range.
    """

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "Checkpoint to start from: a folder or a Hugging Face model id. Required. The model family is read "
            "from its config.json, never from this name."
        },
    )
    tune_mm_llm: bool = field(
        default=False,
        metadata={"help": "Train the language model: its layers, its embeddings and lm_head (tied or not)."},
    )
    tune_mm_mlp: bool = field(
        default=False,
        metadata={"help": "Train the merger between vision and language, with the deepstack mergers where present."},
    )
    tune_mm_vision: bool = field(
        default=False, metadata={"help": "Train the vision encoder, without its mergers (see tune_mm_mlp)."}
    )
    train_mtp: bool = field(
        default=False,
        metadata={
            "help": "Train the layer for multi-token prediction (mtp.*) of Qwen3.5 and newer checkpoints, the draft "
            "model of speculative decoding, at learning_rate, on the same tokens; its loss is logged as mtp_loss. With "
            "tune_mm_llm, tune_mm_mlp and tune_mm_vision False it alone is trained, and the model stays as it is. "
            "Without this flag the layer is saved as it was."
        },
    )
    mtp_loss_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the loss of train_mtp, whose gradient also reaches the trained parts of the model. 0.1 "
            "is the default of Megatron-LM."
        },
    )
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = field(
        default="auto",
        metadata={
            "help": "Attention kernel. auto takes flash-attention 3 or 2 where it is installed and works, else varlen "
            "(the kernel of torch, on a GPU in bf16 or fp16), else sdpa."
        },
    )
    model_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Type of the weights. auto is float32, or bfloat16 under DeepSpeed with bf16, "
            "which keeps float32 copies; AdamW on bfloat16 weights alone loses small updates."
        },
    )
    rope_scaling: Literal["yarn"] | None = field(
        default=None,
        metadata={
            "help": "Train beyond the native context: yarn, with rope_factor. It is saved in config.json, where "
            "transformers and vLLM find it. Leave it out to keep the context of the checkpoint, extended or not."
        },
    )
    rope_factor: float | None = field(
        default=None,
        metadata={
            "help": "Multiple of the native context, with rope_scaling; above 1. Positions of images grow more slowly "
            "than tokens: for a million tokens, Qwen3-VL's model card uses 2 or 3 times its 262144."
        },
    )
    rope_native_length: int | None = field(
        default=None,
        metadata={
            "help": "Native context in positions, with rope_scaling. Default: that of config.json. Qwen2.5-VL's says "
            "128000 where its model card extends from 32768."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with the checkpoint. No supported model needs it."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.mtp_loss_weight < math.inf:
            raise UserError(f"--mtp_loss_weight {self.mtp_loss_weight:g} must be above 0 and finite.")
        if self.rope_scaling is None:
            for name in ("rope_factor", "rope_native_length"):
                if getattr(self, name) is not None:
                    raise UserError(f"--{name} has no effect without --rope_scaling yarn: add it, or leave both out.")
        elif self.rope_factor is None or self.rope_factor <= 1.0:
            raise UserError(
                f"--rope_scaling yarn needs --rope_factor above 1, not {self.rope_factor}: 3 is three times the "
                "native context."
            )
        if self.rope_native_length is not None and self.rope_native_length < 1:
            raise UserError(f"--rope_native_length {self.rope_native_length} must be 1 or more.")
