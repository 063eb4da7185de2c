"""Progress of a run: a bar on a terminal, and a log line for each set of figures."""

from __future__ import annotations

import logging
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback

from qwenvl.utils.logging import shows_bars

logger = logging.getLogger(__name__)


class Progress(ProgressCallback):
    """Shows the Trainer's bars if bars are enabled; logs its figures with their step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the progress bar of the run."""
        if _shows_bars(args):
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Advance the bar of an evaluation."""
        if _shows_bars(args):
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the figures."""
        if state.is_world_process_zero and logs:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, describe(logs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def _shows_bars(args: TrainingArguments) -> bool:
    return shows_bars() and not args.disable_tqdm


def describe(logs: dict[str, Any]) -> str:
    """Return figures as ``name value``, numbers to four digits; counts of single datasets would make the line too long.

    They are in ``trainer_state.json`` and TensorBoard.
    """
    counts = {name for name, value in logs.items() if "/" in name and isinstance(value, int)}
    texts = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in logs.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items() if name not in {"total_flos", *counts})


def follow(trainer: Trainer) -> None:
    """Replace a trainer's own progress callbacks by this one."""
    for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())
