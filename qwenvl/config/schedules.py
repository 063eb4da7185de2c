"""Try the learning rate schedule before anything is loaded."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from qwenvl.config.training import TrainingArguments
from qwenvl.utils.errors import UserError

_WITHOUT_WARMUP = {"constant": "constant_with_warmup", "reduce_lr_on_plateau": "linear", "greedy": "linear"}
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")
_TRIED_STEPS = 10


def check_schedule(training: TrainingArguments) -> None:
    """Check that the schedule takes its arguments, and has the warm-up that is asked for.

    Raises:
        UserError: An argument is missing, unknown or not a number, or would be ignored.
    """
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    if training.warmup_steps and name in _WITHOUT_WARMUP:
        raise UserError(
            f"--lr_scheduler_type {name} has no warm-up, and --warmup_steps or --warmup_ratio asks for one. Use "
            f"--lr_scheduler_type {_WITHOUT_WARMUP[name]}, or leave the warm-up out."
        )
    options = training.lr_scheduler_kwargs
    if options and name in _WITHOUT_ARGUMENTS:
        raise UserError(f"--lr_scheduler_type {name} takes no --lr_scheduler_kwargs. Leave them out.")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, 0, _TRIED_STEPS, scheduler_specific_kwargs=options)
        for _ in range(_TRIED_STEPS):
            optimizer.step()
            schedule.step(*([1.0] if name in ("reduce_lr_on_plateau", "greedy") else []))
    except (TypeError, ValueError, ArithmeticError) as error:
        given = f"--lr_scheduler_kwargs {options}" if options else "without --lr_scheduler_kwargs"
        raise UserError(f"--lr_scheduler_type {name} {given}: {error}. Correct the arguments.") from error
