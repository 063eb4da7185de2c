"""The loss between two log lines, kept over an interruption."""

from __future__ import annotations

import json
import math
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
        self._skipped = 0
        self._step = torch.zeros((), device=device)

    @property
    def of_step(self) -> Tensor:
        """This rank's loss of the step that is under way: float32 []."""
        return self._step

    @property
    def skipped(self) -> int:
        """Steps since the last log line that were not taken."""
        return self._skipped

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch: float32 [], this rank's part of the loss of the optimizer step."""
        self._step += loss.detach()

    def end_step(self, *, taken: bool) -> None:
        """Add the loss of the step to the sum, or forget it if the step was skipped."""
        if taken:
            self._sum += self._step
            self._steps += 1
        else:
            self._skipped += 1
        self._step.zero_()

    def take(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> float:
        """Return the mean loss of the steps since the last call, and begin anew; every rank has to call it.

        NaN if all of them were skipped.
        """
        total = mean_over_ranks(self._sum).item() / self._steps if self._steps else math.nan
        self._sum.zero_()
        self._steps = self._skipped = 0
        return total

    def save(self, folder: Path, *, writes: bool) -> None:
        """Write it to a checkpoint; every rank has to call it, and those write whose ``writes`` is true."""
        sums = gather_objects(self._sum.item())
        if writes:
            state = {"steps": self._steps, "skipped": self._skipped, "sums": sums}
            (folder / FILE_NAME).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def take_up(self, folder: str) -> None:
        """Go on with what a checkpoint holds; one of the stock Trainer holds nothing."""
        path = Path(folder) / FILE_NAME
        if path.exists():
            state = json.loads(path.read_text(encoding="utf-8"))
            sums, self._steps, self._skipped = state["sums"], state["steps"], state.get("skipped", 0)
            self._sum.fill_(sums[rank()] if len(sums) == world_size() else sum(sums) / len(sums))
