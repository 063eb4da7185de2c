"""The loss between two log lines, kept over an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qwenvl.utilities.distributed import gather_objects, rank, world_size

FILE_NAME = "running_loss.json"


class RunningLoss:
    """Sums the loss of this rank since the last log line.

    The Trainer does so too, but forgets the sum in a resumed run, whose next line is then the mean of other steps; and
    it puts the mean of earlier steps in the place of a loss that is not finite.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._steps = 0

    def add(self, loss: Tensor, *, ends_step: bool) -> None:
        """Add the loss of a micro-batch.

        Args:
            loss: float32 [], this rank's part of the loss of the optimizer step.
            ends_step: it is the last one of the step.
        """
        self._sum += loss.detach()
        self._steps += ends_step

    def take(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> float:
        """Return the mean loss of the steps since the last call, and begin anew; every rank has to call it."""
        total = mean_over_ranks(self._sum).item() / max(self._steps, 1)
        self._sum.zero_()
        self._steps = 0
        return total

    def save(self, folder: Path, *, writes: bool) -> None:
        """Write it to a checkpoint; every rank has to call it, and those write whose ``writes`` is true."""
        sums = gather_objects(self._sum.item())
        if writes:
            (folder / FILE_NAME).write_text(json.dumps({"steps": self._steps, "sums": sums}) + "\n", encoding="utf-8")

    def take_up(self, folder: str) -> None:
        """Go on with what a checkpoint holds; one of the stock Trainer holds nothing."""
        path = Path(folder) / FILE_NAME
        if path.exists():
            state = json.loads(path.read_text(encoding="utf-8"))
            sums, self._steps = state["sums"], state["steps"]
            self._sum.fill_(sums[rank()] if len(sums) == world_size() else sum(sums) / len(sums))
