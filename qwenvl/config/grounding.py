"""Flags of ``--task grounding``: masks from a frozen model's attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwenvl.utils.errors import UserError


@dataclass
class GroundingArguments:
    """Flags of masks; see :mod:`qwenvl.tasks.grounding.module`. Every field is explained by its ``help``.

    Raises:
        UserError: values out of range.
    """

    mask_resolution: int = field(
        default=64,
        metadata={
            "help": "--task grounding: least number of cells of a mask's longer side; images with more tokens have a "
            "cell per token."
        },
    )
    mask_channels: int = field(
        default=64, metadata={"help": "--task grounding: channels of the U-Net's first stage; each later one doubles."}
    )
    attention_merge: Literal["mean", "max"] = field(
        default="mean", metadata={"help": "--task grounding: reduction of the attention over the tokens of a phrase."}
    )
    sam_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "--task grounding: SAM checkpoint that refines masks, such as facebook/sam-vit-base; prompted by "
            "the U-Net's mask, its box and the phrase. Its mask decoder is trained too. Default: none."
        },
    )

    def check_grounding(self) -> None:
        """Check these flags.

        Raises:
            UserError: one is out of range.
        """
        if self.mask_resolution < 8 or self.mask_channels < 1:
            raise UserError("--mask_resolution must be 8 or more, and --mask_channels 1 or more.")
