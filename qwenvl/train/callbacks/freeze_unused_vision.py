"""Keeping parameters where they are in a step whose samples do not reach them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_VISUAL = ("vision/", "merger/")


class UnusedVision(TrainerCallback):
    """Holds the vision tower and its mergers still in steps without any picture.

    The blank picture that every text-only batch carries gives them gradients of exactly zero, not none, so that weight
    decay and momentum would move them. A learning rate of zero for the step keeps them in place, under DeepSpeed as
    well, whose optimizer works on flat partitions of all parameters.
    """

    def __init__(self) -> None:
        self._rates: list[tuple[dict[str, Any], float]] = []

    def begin_step(self, optimizer: torch.optim.Optimizer, *, pictures: bool) -> None:
        """Prepare the optimizer for a step; every rank has to say the same.

        Args:
            optimizer: with groups named as in :func:`qwenvl.models.trainable.param_groups.parameter_groups`.
            pictures: some rank has a picture or video in the step.
        """
        self._restore()
        if not pictures:
            groups = [group for group in optimizer.param_groups if group["name"].startswith(_VISUAL)]
            self._rates = [(group, group["lr"]) for group in groups]
            for group in groups:
                group["lr"] = 0.0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the groups their learning rates back, before the schedule computes the next ones."""
        del args, state, control, kwargs
        self._restore()

    def _restore(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []
