"""Flags of the ranking of samples."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenvl.cli.inference_args import ModelArguments
from qwenvl.evaluate.ranking import DROPPED, REASONS
from qwenvl.utils.errors import UserError


@dataclass
class RankArguments(ModelArguments):
    """Flags of this tool, besides those of the tools that run a model."""

    sample_losses: list[str] | None = field(
        default=None, metadata={"help": "Files that training with --log_sample_losses True wrote."}
    )
    output: str = field(default="ranking", metadata={"help": "Folder for the output files."})
    drop: list[str] | None = field(
        default=None,
        metadata={"help": f"Reasons whose samples *_kept.jsonl leaves out. Default: {' '.join(DROPPED)}."},
    )
    decisions: str | None = field(
        default=None, metadata={"help": "decisions.jsonl of the page: samples to keep or to drop in spite of the list."}
    )
    limit: int = field(default=200, metadata={"help": "Most samples of the page, from the first on; 0 for no page."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of other samples' images."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sample_losses and not self.model_name_or_path:
            raise UserError("Give --sample_losses FILE, --model_name_or_path MODEL with --dataset_use, or both.")
        if self.limit < 0 or self.batch_size < 1:
            raise UserError("--limit must be 0 or more, and --batch_size 1 or more.")
        unknown = [name for name in self.drop or () if name not in REASONS]
        if unknown:
            raise UserError(f"--drop {unknown[0]} is not one of {', '.join(REASONS)}.")

    @property
    def dropped_reasons(self) -> frozenset[str]:
        """Reasons whose samples are left out of the lists."""
        return frozenset(DROPPED if self.drop is None else self.drop)
