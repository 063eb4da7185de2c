"""Freeze the vision parameters in optimizer steps without images and videos."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_VISUAL = ("vision/", "merger/")


class UnusedVision(TrainerCallback):
    """Freezes the vision tower and its mergers in steps without images and videos.

    The blank image of a text-only batch gives them gradients of exactly zero, not None, so that weight decay and
    momentum would still change them. A learning rate of zero for the step prevents that, also under DeepSpeed, whose
    optimizer works on flat partitions of all parameters.
    """

    def __init__(self) -> None:
        self._rates: list[tuple[dict[str, Any], float]] = []

    def begin_step(self, optimizer: torch.optim.Optimizer, *, has_media: bool) -> None:
        """Prepare the optimizer for a step; every rank must pass the same value.

        Args:
            optimizer: Optimizer with the group names of :func:`qwenvl.models.trainable.param_groups.parameter_groups`.
            has_media: Whether any rank has an image or video in the step.
        """
        self._restore()
        if not has_media:
            groups = [group for group in optimizer.param_groups if group["name"].startswith(_VISUAL)]
            self._rates = [(group, group["lr"]) for group in groups]
            for group in groups:
                group["lr"] = 0.0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the learning rates of the groups, before the schedule computes the next ones."""
        del args, state, control, kwargs
        self._restore()

    def _restore(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []
