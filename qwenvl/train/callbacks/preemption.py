"""Preemption: save a checkpoint and stop on a signal, before a job's time limit or to make room for another job."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# Schedulers and `docker stop` send SIGTERM; SLURM sends SIGUSR1 before the time limit (--signal=USR1@120).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""Exit code of a run that stopped on request: EX_TEMPFAIL of sysexits.h, "try again"."""


class EvaluationStoppedError(Exception):
    """An evaluation was left, on all ranks, because a process received a signal."""


class StopRequest(TrainerCallback):
    """Saves a checkpoint and ends the run after a step in which a process received one of :data:`SIGNALS`.

    Processes receive a signal at different times, or only one of them receives it; they agree at the start of each
    step, and before each batch of an evaluation.

    Attributes:
        received: Whether this process received a signal.
        stopped_at: Last step of the run; None while it has not stopped.
    """

    def __init__(self) -> None:
        self.received = False
        self.stopped_at: int | None = None
        self._agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while the context is open; repeated ones, which are common, have no further effect."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def begin_step(self, *, agreed: bool) -> None:
        """Set whether any process has received a signal; every rank must pass the same value."""
        if agreed and not self._agreed:
            logger.warning("Asked to stop by a signal: a checkpoint follows after this step.")
        self._agreed = agreed

    def leave_evaluation(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Save and stop after the step whose evaluation was left."""
        self.begin_step(agreed=True)
        control.should_evaluate = True
        self.on_step_end(args, state, control)
        control.should_evaluate = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop. Skip an evaluation that is due, as the remaining time may not suffice for both."""
        del args, kwargs
        if self._agreed and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save, control.should_training_stop = True, True
            if control.should_evaluate:
                control.should_evaluate = False
                logger.warning("The evaluation of step %d is left out.", state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Suppress the actions of an epoch's end: the Trainer calls this when it stops in the middle of an epoch."""
        del args, state, kwargs
        if self.stopped_at is not None:
            control.should_evaluate = control.should_save = control.should_log = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.received = True  # nothing more, as the signal may interrupt a log call
