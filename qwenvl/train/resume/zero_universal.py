"""Resume under DeepSpeed: check the ZeRO stage, and convert checkpoints for another number of ranks."""

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
"""Folder inside the output folder for a converted checkpoint, until it is loaded."""

_STAGES = {0: "0", 1: "1 or 2", 3: "3"}


@contextmanager
def fitted_to_ranks(checkpoint: str | None, trainer: Trainer) -> Iterator[str | None]:
    """Yield the folder to resume from: the checkpoint, or a copy converted for this number of ranks.

    ZeRO splits the optimizer's state over the ranks, and reads it on the same number of ranks only. For another number,
    process 0 writes a copy in DeepSpeed's universal format, which is removed after the first step. Every process must
    enter the context.

    Args:
        checkpoint: Complete checkpoint, or None.
        trainer: Trainer of the resumed run.

    Raises:
        UserError: The checkpoint has another kind of ZeRO stage, or DeepSpeed cannot convert it.
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
    if trainer.args.load_best_model_at_end:  # it would load one at the end of the run
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
    """Return the files of the optimizer's state, one per rank of the saved run; none with ZeRO stage 0."""
    return sorted(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))


def _require_same_stage(checkpoint: str, shards: list[Path], stage: int) -> None:
    """Refuse a checkpoint of another stage, whose files DeepSpeed would not find or would misread."""
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
    """Write a checkpoint in universal format below ``folder``; return its path."""
    logger.warning(
        "%s was saved by %s, and this run has %d. The optimizer's state is converted for any number of ranks "
        "(DeepSpeed's universal checkpoint) in %s; weights and optimizer do not change. It needs the time and space of "
        "about two more checkpoints, and is removed after the first step.",
        *(checkpoint, _ranks(saved_ranks), world_size(), folder),
    )
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that stopped during a conversion
    shards = _shards(checkpoint)[0].parent
    target = folder / checkpoint.name
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(shards), "--output_folder", str(target / shards.name)]
    # in a separate process, because it forks, which is not safe after communication has started
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    # without moments, DeepSpeed would load only the weights
    if done.returncode != 0 or not any((target / shards.name / "zero").glob("*/exp_avg.pt")):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{checkpoint} was saved by {_ranks(saved_ranks)}, and DeepSpeed could not convert it for {world_size()}: "
            f"{reason if done.returncode else 'it holds no moments'}. Only the state of Adam can be converted (--optim "
            f"adamw_torch and its like), and the disk must have room. Resume on {_ranks(saved_ranks)}; or "
            f"{start_anew(checkpoint)}."
        )
    for file in checkpoint.iterdir():  # the files that the Trainer reads itself
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy2(file, target)
    logger.warning("The optimizer's state is converted.")
    return target


class _AfterLoading(TrainerCallback):
    """Corrects the step counts after DeepSpeed loaded a universal checkpoint, and removes it after a step.

    With stage 3, all parameter groups share one tensor as step count, which would count each step several times.

    Args:
        folder: Folder of the universal checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give each group its own step count."""
        del args, state, control
        for moments in kwargs["optimizer"].state.values():
            if torch.is_tensor(moments.get("step")):
                moments["step"] = moments["step"].clone()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the folder: every rank has loaded it, and a step ran without running out of memory."""
        del args, state, control, kwargs
        _remove(self._folder.parent)


def _remove(folder: Path) -> None:
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
