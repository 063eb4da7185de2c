"""Being asked to stop: before the time limit of a job, or to make room for another one."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# SIGTERM: what schedulers and `docker stop` send. SIGUSR1: what SLURM sends before the time limit (--signal=USR1@120).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""Exit code of a run that stopped on request: EX_TEMPFAIL of sysexits.h, "try again"."""


class StopRequest(TrainerCallback):
    """Ends the run after a step in which a process got one of :data:`SIGNALS`, with a checkpoint of that step.

    Processes get a signal at different times, or only one of them gets it: they agree at the beginning of each step.

    Attributes:
        received: this process got a signal.
        stopped_at: the step that the run ended after; None while it has not.
    """

    def __init__(self) -> None:
        self.received = False
        self.stopped_at: int | None = None
        self._agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signals meanwhile. Further ones change nothing: a job's processes often get several."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def begin_step(self, *, agreed: bool) -> None:
        """Say whether any process has received a signal; every rank has to say the same."""
        if agreed and not self._agreed:
            logger.warning("Asked to stop by a signal: a checkpoint follows after this step.")
        self._agreed = agreed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop. An evaluation that is due is left out: the time that is left may not be enough for both."""
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
        """The Trainer ends the epoch when it stops: no epoch is over."""
        del args, state, kwargs
        if self.stopped_at is not None:
            control.should_evaluate = control.should_save = control.should_log = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.received = True  # nothing more: the signal may have come in the middle of a line that is logged
