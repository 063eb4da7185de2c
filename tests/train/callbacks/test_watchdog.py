"""The watchdog ends a process that hangs in training or evaluation, and no other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from transformers import TrainerCallback

from qwenvl.train.callbacks.watchdog import Watchdog
from qwenvl.train.trainer import Trainer


class Failing(TrainerCallback):
    """Fails in the middle of the first step, and keeps whether the clock runs there."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.deadline: float | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.deadline = self.watchdog._deadline
        raise ZeroDivisionError


def test_no_clock_runs_after_a_training_that_failed(trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of()
    failing = Failing(trainer._watchdog)
    trainer.add_callback(failing)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert failing.deadline is not None, "it ran in the step"
    assert trainer._watchdog._deadline is None


def test_its_thread_ends_with_its_duty() -> None:
    watchdog = Watchdog(1000)
    with watchdog.on_duty():
        watchdog.watch("a step")
        thread = watchdog._thread
        assert thread is not None and thread.is_alive()
    thread.join()
    assert watchdog._thread is None


def test_evaluation_within_training_leaves_it_on_duty() -> None:
    watchdog = Watchdog(1000)
    with watchdog.on_duty():
        with watchdog.on_duty():
            watchdog.watch("evaluation")
        assert watchdog._deadline is not None
    assert watchdog._deadline is None


def test_nothing_is_watched_outside_of_training_and_evaluation() -> None:
    before = threading.active_count()
    watchdog = Watchdog(1000)
    watchdog.watch("a step")
    assert watchdog._deadline is None and threading.active_count() == before
