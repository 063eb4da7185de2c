"""The learning rates on a log line: that of the run, and those of the parts that have their own."""

from __future__ import annotations

from torch.optim import Optimizer

from qwenvl.models.trainable.param_groups import learning_rates_of


class LearningRates:
    """Reads the learning rates of an optimizer.

    Engines return the states of groups without their names, which are therefore kept from the beginning.

    Args:
        learning_rate: Rate of the parts that have none of their own (``--learning_rate``).

    Attributes:
        of_parts: ``learning_rate_PART`` of each part at the last reading, where they differ.
    """

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._names: list[str] = []
        self._main_group = 0
        self._differ = False
        self.of_parts: dict[str, float] = {}

    def begin(self, optimizer: Optimizer) -> None:
        """Note the groups of a new optimizer, which are named."""
        self._names = [group["name"] for group in optimizer.param_groups]
        # a schedule that began already, as with --auto_find_batch_size, has noted the rates it began with
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._main_group = rates.index(self._learning_rate) if self._learning_rate in rates else 0
        self._differ = len(set(rates)) > 1

    def read(self, optimizer: Optimizer) -> float:
        """Return the rate of the parts that have none of their own, and note those of all parts.

        The stock Trainer logs that of the first group, which is the vision tower's wherever it trains. Where every part
        has its own, there is no other to log.
        """
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if self._differ:
            groups = [{"name": name, "lr": rate} for name, rate in zip(self._names, rates, strict=True)]
            self.of_parts = {f"learning_rate_{part}": rate for part, rate in learning_rates_of(groups).items()}
        return rates[self._main_group]
