"""Resuming under DeepSpeed: its files fit one kind of ZeRO stage and, until they are converted, one number of ranks."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwenvl.models.lora.files import start_anew
from qwenvl.utils.distributed import from_main_process, is_main_process, world_size
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

CONVERTED = ".universal"
"""Folder inside the output folder in which a checkpoint for any number of ranks lies until it is loaded."""

_STAGES = {0: "0", 1: "1 or 2", 3: "3"}


@contextmanager
def fitted_to_ranks(checkpoint: str | None, trainer: Trainer) -> Iterator[str | None]:
    """Give the folder to resume from: the checkpoint itself, or one that holds the same for this number of ranks.

    ZeRO splits the optimizer's state over the ranks and reads it on as many again. For another number, process 0
    writes a copy in DeepSpeed's universal form, which any number reads; it is removed once a step was taken from it.
    Every process has to enter.

    Args:
        checkpoint: a complete one, or None.
        trainer: that resumes.

    Raises:
        UserError: the checkpoint is of another kind of ZeRO stage, or DeepSpeed cannot convert it.
    """
    settings = getattr(trainer.args, "hf_deepspeed_config", None)
    if checkpoint is None or settings is None:
        yield checkpoint
        return
    shards = _shards(Path(checkpoint))
    _require_same_stage(checkpoint, shards, settings.get_value("zero_optimization.stage", 0))
    if len(shards) in (0, world_size()):
        yield checkpoint
        return
    if trainer.args.load_best_model_at_end:  # as it would at the end of the run
        raise UserError(
            f"--load_best_model_at_end: DeepSpeed loads a checkpoint of {_ranks(len(shards))} on as many only, and the "
            f"best one may be of those, while this run has {world_size()}. Resume without it."
        )
    folder = Path(trainer.args.output_dir) / CONVERTED
    try:
        converted = from_main_process(partial(_convert, Path(checkpoint), folder, len(shards)))
        settings.config["checkpoint"] = {**settings.config.get("checkpoint", {}), "load_universal": True}
        trainer.add_callback(_AfterLoading(converted))
        yield str(converted)
    finally:
        _remove(folder)


def _shards(checkpoint: Path) -> list[Path]:
    """Return the files that hold the optimizer's state, one for each rank that saved; none with ZeRO stage 0."""
    return sorted(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))


def _require_same_stage(checkpoint: str, shards: list[Path], stage: int) -> None:
    """Refuse files of a stage that DeepSpeed would look for under other names, or misread."""
    splits_weights = any(Path(checkpoint).glob("global_step*/*zero_pp_rank_*_model_states.pt"))
    saved = (3 if splits_weights else 1) if shards else 0
    if saved != (1 if stage == 2 else stage):
        raise UserError(
            f"{checkpoint} was saved with ZeRO stage {_STAGES[saved]}, and --deepspeed names a configuration of stage "
            f"{stage}, which cannot read the optimizer's state of the other. Resume with a configuration of stage "
            f"{_STAGES[saved]}; or {start_anew(checkpoint)}."
        )


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _convert(checkpoint: Path, folder: Path, saved_ranks: int) -> Path:
    """Write the universal form of a checkpoint below ``folder``; return where."""
    logger.warning(
        "%s was saved by %s, and this run has %d. The optimizer's state is converted for any number of ranks "
        "(DeepSpeed's universal checkpoint) in %s: weights and optimizer go on as they were. It needs the time and "
        "space of about two more checkpoints, and is removed after the first step.",
        *(checkpoint, _ranks(saved_ranks), world_size(), folder),
    )
    shutil.rmtree(folder, ignore_errors=True)  # of a run that stopped meanwhile
    shards = _shards(checkpoint)[0].parent
    target = folder / checkpoint.name
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(shards), "--output_folder", str(target / shards.name)]
    # a process of its own: it forks others, which must not happen where communication has begun
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    # without the moments, the weights alone would be loaded
    if done.returncode != 0 or not any((target / shards.name / "zero").glob("*/exp_avg.pt")):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{checkpoint} was saved by {_ranks(saved_ranks)}, and DeepSpeed could not convert it for {world_size()}: "
            f"{reason if done.returncode else 'it holds no moments'}. Only the state of Adam can be converted (--optim "
            f"adamw_torch and its like), and the disk must have room. Resume on {_ranks(saved_ranks)}; or "
            f"{start_anew(checkpoint)}."
        )
    for file in checkpoint.iterdir():  # what the Trainer reads besides
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy2(file, target)
    logger.warning("The optimizer's state is converted.")
    return target


class _AfterLoading(TrainerCallback):
    """Mends what DeepSpeed got wrong in loading a universal checkpoint, and removes it after a step.

    Stage 3 gives all parameter groups one and the same tensor to count their steps in, which then counts each step
    several times.

    Args:
        folder: of the universal checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give each group its own count of steps."""
        del args, state, control
        for moments in kwargs["optimizer"].state.values():
            if torch.is_tensor(moments.get("step")):
                moments["step"] = moments["step"].clone()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the folder: every rank has loaded it, and memory has sufficed for a step."""
        del args, state, control, kwargs
        _remove(self._folder.parent)


def _remove(folder: Path) -> None:
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
