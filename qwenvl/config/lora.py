"""Flags of adapters: their layers and their kind."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from qwenvl.utils.errors import UserError, nearest

Part = Literal["vision", "merger", "language"]
PARTS: tuple[Part, ...] = get_args(Part)

Target = Literal["vision", "merger", "language", "experts"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass
class AdapterArguments:
    """LoRA and its variants, through PEFT. Every field is explained by its ``help``.

    Raises:
        UserError: values that contradict each other or are out of range.
    """

    lora_enable: bool = field(
        default=False,
        metadata={"help": "Train adapters (LoRA), and the parts named by tune_mm_* in full."},
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: float = field(default=128, metadata={"help": "Scale of the adapters; their weight is alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters, 0 to 1; 0 means none."})
    lora_target: str = field(
        default="language,experts",
        metadata={
            "help": "Layers that get adapters: linear layers of language, vision or merger, the stacked experts of a "
            "mixture, several with commas, all, or a regular expression that whole names of linear layers and of "
            "modules of experts match. Routers, embeddings and lm_head get no adapters."
        },
    )
    lora_expert_r: int = field(
        default=0,
        metadata={
            "help": "Rank of each stacked expert's adapter; 0 for lora_r / experts per token, rounded up. Their weight "
            "is alpha / this rank."
        },
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: train magnitude and direction of each weight separately."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "rsLoRA: scale adapters by alpha / sqrt(r), for high ranks."}
    )
    quantization_bit: int = field(
        default=0,
        metadata={
            "help": "QLoRA: hold the frozen language model in 4 bits (NF4, by bitsandbytes, on a CUDA device). 0 for "
            "none. tools/merge_lora.py merges into the original weights."
        },
    )

    def __post_init__(self) -> None:
        if self.lora_r < 1 or self.lora_alpha <= 0:
            raise UserError("--lora_r and --lora_alpha must be above 0.")
        if self.lora_expert_r < 0:
            raise UserError(f"--lora_expert_r {self.lora_expert_r} must be 0 or more.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"--lora_dropout {self.lora_dropout:g} must be 0 to below 1.")
        if self.quantization_bit not in (0, 4):
            raise UserError(f"--quantization_bit {self.quantization_bit} is neither 0 nor 4.")
        if self.quantization_bit and not self.lora_enable:
            raise UserError(
                "--quantization_bit needs --lora_enable True: quantized weights are not trainable themselves."
            )
        target_parts(self.lora_target)

    @property
    def adapted_parts(self) -> tuple[Part, ...]:
        """Parts that may have adapters; all for a regular expression, none without adapters."""
        if not self.lora_enable:
            return ()
        parts = target_parts(self.lora_target)
        named = {"language" if part == "experts" else part for part in parts or TARGETS}
        return tuple(part for part in PARTS if part in named)


def target_parts(target: str) -> tuple[Target, ...] | None:
    """Return the parts of a model that ``--lora_target`` names; None for a regular expression.

    Raises:
        UserError: the text is neither.
    """
    words = [word.strip() for word in target.split(",")]
    if words == ["all"]:
        return TARGETS
    if all(word in TARGETS for word in words):
        return tuple(part for part in TARGETS if part in words)
    if re.fullmatch(r"[\w ,]+", target):  # no character of a regular expression: an unknown word
        wrong = next(word for word in words if word not in TARGETS)
        options = f"{', '.join(TARGETS)}, all, or a regular expression of layers' names"
        raise UserError(f"--lora_target {target}: {wrong!r} is none of {options}.{nearest(wrong, (*TARGETS, 'all'))}")
    try:
        re.compile(target)
    except re.error as error:
        raise UserError(f"--lora_target {target!r} is no regular expression: {error}.") from error
    return None


def contradiction(flag: str, target: str) -> str:
    """Return the message where a part would be trained in full and by adapters."""
    return (
        f"--{flag} True trains a part in full that --lora_target {target} gives adapters to. Set --{flag} False, or "
        "leave the part out of --lora_target (language, experts, vision, merger)."
    )
