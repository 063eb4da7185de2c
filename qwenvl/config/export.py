"""Flags of writing the finished model and verifying it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from qwenvl.utils.errors import UserError

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass
class ExportArguments:
    """Flags of the finished model folder, part of ``TrainingArguments``. Every field is explained by its ``help``."""

    verify_export: bool | str = field(
        default="auto",
        metadata={
            "help": "Open the finished folder in a fresh process with stock transformers, and compare its logits with "
            "the trainer's: true, false, or auto, which verifies if another copy of the model fits into free memory.",
            "const": True,
        },
    )
    save_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Precision of the weights of the finished model; auto is that of each tensor in the starting "
            "checkpoint, never wider than in training. Adapters and checkpoints keep the training precision, so that a "
            "resumed run continues exactly."
        },
    )
    max_shard_size: str = field(
        default="5GB",
        metadata={"help": "Largest weight file of the finished model, such as 5GB or 500MB; larger ones are split."},
    )

    checkpoint_hash: Literal["fast", "full"] = field(
        default="fast",
        metadata={
            "help": "Hashes by which a resumed run notices a damaged checkpoint: fast, of small files and of 64 evenly "
            "spaced MiB of each large one, in seconds; full, also of every byte, added in the background while "
            "training goes on, and read again before a run resumes: minutes for large models."
        },
    )

    def check_export(self) -> None:
        """Check the flags of export.

        Raises:
            UserError: a value is invalid.
        """
        if self.verify_export not in (True, False, "auto"):
            raise UserError(f"--verify_export {self.verify_export} is not one of true, false, auto.")
        shard_bytes(self.max_shard_size)


def shard_bytes(size: str) -> int:
    """Return a size such as ``5GB`` in bytes; units are powers of 1000, as in transformers.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.strip().upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--max_shard_size {size} is not a size: write a number and KB, MB, GB or TB, such as 5GB.")
    return int(float(match[1]) * _SIZES[match[2]])
