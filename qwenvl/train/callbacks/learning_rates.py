"""Learning rates for the log: that of the run, and those of module groups with their own rate."""

from __future__ import annotations

from torch.optim import Optimizer

from qwenvl.models.trainable.param_groups import learning_rates_of


class LearningRates:
    """Reads the learning rates of an optimizer.

    Engines drop the names of parameter groups, which are therefore recorded at the start.

    Args:
        learning_rate: Rate of module groups without their own (``--learning_rate``).

    Attributes:
        of_parts: Rates at the last reading as ``learning_rate_PART``; empty if all groups have the same rate.
    """

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._names: list[str] = []
        self._main_group = 0
        self._differ = False
        self.of_parts: dict[str, float] = {}

    def begin(self, optimizer: Optimizer) -> None:
        """Record the names of a new optimizer's parameter groups."""
        self._names = [group["name"] for group in optimizer.param_groups]
        # a schedule that already started, as with --auto_find_batch_size, has recorded the initial rates
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._main_group = rates.index(self._learning_rate) if self._learning_rate in rates else 0
        self._differ = len(set(rates)) > 1

    def read(self, optimizer: Optimizer) -> float:
        """Return the rate of the module groups without their own, and record the rates of all groups.

        The stock Trainer logs the rate of the first group, which is the vision tower's if it trains. That rate is
        returned here only if every group has its own.
        """
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if self._differ:
            groups = [{"name": name, "lr": rate} for name, rate in zip(self._names, rates, strict=True)]
            self.of_parts = {f"learning_rate_{part}": rate for part, rate in learning_rates_of(groups).items()}
        return rates[self._main_group]
