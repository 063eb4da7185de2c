"""Optimizer settings of a resumed run: they come from its flags; only moments and step counts from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose learning rates depend on the course of the run, and exist only in the checkpoint.

All others in transformers are functions of the step (``LambdaLR``).
"""


@dataclass(frozen=True)
class Hyperparameters:
    """Settings of an optimizer from the flags, read before a checkpoint is loaded into it.

    ``load_state_dict`` overwrites learning rates, weight decay and all other settings of the parameter groups with the
    file's; DeepSpeed also overwrites the gradient clipping threshold. DeepSpeed's universal checkpoints give all groups
    the settings of the first one (ZeRO-3).

    Args:
        groups: Settings of each parameter group, with its peak learning rate as ``initial_lr``.
        clip_grad: DeepSpeed's clipping threshold; None for other optimizers.
    """

    groups: tuple[Mapping[str, Any], ...]
    clip_grad: float | None

    @classmethod
    def read(cls, optimizer: Optimizer) -> Hyperparameters:
        """Return the settings of an optimizer with a schedule, before a checkpoint is loaded.

        Args:
            optimizer: Optimizer prepared by accelerate.
        """
        groups = tuple(
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        )
        return cls(groups, getattr(_engine(optimizer), "clip_grad", None))

    def restore(self, optimizer: Optimizer, schedule: LRScheduler) -> None:
        """Apply these settings to an optimizer after a checkpoint was loaded, at the current step of its schedule.

        With the settings of the run that saved the checkpoint, the result is bit-identical.
        """
        rates = schedule.get_last_lr()
        if isinstance(schedule, LambdaLR):
            peaks = [group["initial_lr"] for group in self.groups]
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            rates = [peak * factor for peak, factor in zip(peaks, factors, strict=True)]
            schedule.load_state_dict({**schedule.state_dict(), "base_lrs": peaks, "_last_lr": rates})
        for group, settings, rate in zip(optimizer.param_groups, self.groups, rates, strict=True):
            group.update(settings, lr=rate)
        if self.clip_grad is not None:
            _engine(optimizer).clip_grad = self.clip_grad


def _engine(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
