"""End a run that hangs, and log the stack of each rank."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

EXIT_CODE = 3
_SECONDS_FOR_THE_OTHERS = 3.0  # the launcher ends all ranks after the first one; this lets them log theirs


class Watchdog(TrainerCallback):
    """Ends this process when a step takes too long.

    The clock runs from a step's request for its batches until its figures are logged, for which ranks wait for each
    other, and during each batch of an evaluation. It is stopped while a checkpoint is saved, and outside of training
    and evaluation, even if an error ended them.

    Args:
        seconds: Time limit of a step (``--step_timeout``), in seconds; 0 for none.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        self._about = ""
        self._thread: threading.Thread | None = None
        self._on_duty = False

    @contextmanager
    def on_duty(self) -> Iterator[None]:
        """Let the clock run only while the context is open, however it is left; contexts may be nested."""
        before, self._on_duty = self._on_duty, True
        try:
            yield
        finally:
            self._on_duty = before
            if not before:
                self.rest()
                self._thread = None  # the thread ends by itself

    def watch(self, about: str) -> None:
        """Start the clock, or start it again.

        Args:
            about: Description of what is being done, for the message.
        """
        self._about = about
        if not self._seconds or not self._on_duty:
            return
        self._deadline = time.monotonic() + self._seconds
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """Stop the clock."""
        self._deadline = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restart the clock: the step's log line comes next."""
        del args, state, control, kwargs
        self.watch(self._about)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        del args, state, control, kwargs
        self.rest()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        del args, state, control, kwargs
        self.rest()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restart the clock."""
        del args, control, kwargs
        self.watch(f"evaluation after step {state.global_step}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        del args, state, control, kwargs
        self.rest()

    def _run(self) -> None:
        while self._on_duty:
            time.sleep(min(1.0, self._seconds / 4))
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                logger.error(
                    "Nothing moved for %g s (--step_timeout): %s.\n%s", self._seconds, self._about, _main_stack()
                )
                time.sleep(_SECONDS_FOR_THE_OTHERS)
                os._exit(EXIT_CODE)  # the main thread hangs, and a regular exit would hang too


def _main_stack() -> str:
    """Return the stack trace of the main thread."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame)).rstrip()
