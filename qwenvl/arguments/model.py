"""What is trained and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelArguments:
    """The checkpoint and which of its parts are trained. Every field is explained by its ``help``."""

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
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = field(
        default="auto",
        metadata={"help": "Attention kernel. auto takes flash-attention where it is installed and works, else sdpa."},
    )
    model_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Type in which the weights are kept. auto is float32, or bfloat16 under DeepSpeed with bf16, "
            "which keeps float32 copies; AdamW on bfloat16 weights alone loses small updates."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with the checkpoint. No supported model needs it."},
    )
