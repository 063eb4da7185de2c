"""Mean loss between two log lines, preserved when a run is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl.utils.distributed import gather_objects, rank, world_size

FILE_NAME = "running_loss.json"


class RunningLoss:
    """Sums the loss of this rank since the last log line, and since the start of the run.

    The stock Trainer does so too, with three faults: it loses the sums of a resumed run, so that the next line averages
    other steps; it replaces a non-finite loss by the mean of earlier steps, or the mean of the run becomes non-finite;
    and it keeps sums from before ``--auto_find_batch_size`` restarted the run.

    Args:
        device: Device of the losses.
        apart: Names of losses that the log shows besides ``loss``.
    """

    def __init__(self, device: torch.device, apart: Sequence[str] = ()) -> None:
        self._apart = tuple(apart)
        # the loss, then those apart
        self._step, self._sum = (torch.zeros(1 + len(apart), device=device) for _ in range(2))
        self._beginning: dict[str, Any] = {}
        self.start_over()

    def start_over(self) -> None:
        """Reset to the sums of the checkpoint that the run resumed from, or to zero."""
        state = self._beginning
        self._step.zero_()
        sums = [state.get("sums", [0.0]), *(state.get("apart", {}).get(name, [0.0]) for name in self._apart)]
        self._sum.copy_(torch.tensor([_share(each) for each in sums]))
        self._steps, self._skipped = state.get("steps", 0), state.get("skipped", 0)
        self._logged_sum, self._logged_steps = state.get("logged_sum", 0.0), state.get("logged_steps", 0)

    @property
    def of_step(self) -> Tensor:
        """This rank's loss of the current step: float32 []."""
        return self._step[0]

    def add(self, loss: Tensor, apart: Mapping[str, Tensor] | None = None) -> None:
        """Add the loss of a micro-batch.

        Args:
            loss: float32 [], this rank's part of the loss of the optimizer step.
            apart: The losses apart, likewise, by name.
        """
        losses = [loss, *((apart or {})[name] for name in self._apart)]
        self._step += torch.stack([each.detach().to(self._step) for each in losses])

    def end_step(self, *, taken: bool) -> None:
        """Add the loss of the step to the sum, or drop it if the step was skipped."""
        if taken:
            self._sum += self._step
            self._steps += 1
        else:
            self._skipped += 1
        self._step.zero_()

    def take(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the figures since the last call, and reset them; every rank must call it.

        Returns:
            ``loss`` and the losses apart, means over the steps taken, NaN if there were none; ``skipped_steps``, if
            there are any.
        """
        totals = mean_over_ranks(self._sum).tolist()
        means = [total / self._steps if self._steps else math.nan for total in totals]
        skipped = {"skipped_steps": self._skipped} if self._skipped else {}
        figures = {**dict(zip(("loss", *self._apart), means, strict=True)), **skipped}
        self._logged_sum += totals[0]
        self._logged_steps += self._steps
        self._sum.zero_()
        self._steps = self._skipped = 0
        return figures

    def of_run(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> float:
        """Return the mean loss over all steps of the run, including those before it was resumed.

        NaN if no step was taken; every rank must call it.
        """
        total, steps = mean_over_ranks(self._sum)[0].item() + self._logged_sum, self._steps + self._logged_steps
        return total / steps if steps else math.nan

    def save(self, folder: Path, *, writes: bool) -> None:
        """Write the sums to a checkpoint; every rank must call it, and ranks with ``writes`` write."""
        sums, *apart = zip(*gather_objects(self._sum.tolist()), strict=True)
        if writes:
            state = {
                "steps": self._steps,
                "skipped": self._skipped,
                "sums": sums,
                **({"apart": dict(zip(self._apart, apart, strict=True))} if apart else {}),
                "logged_steps": self._logged_steps,
                "logged_sum": self._logged_sum,
            }
            (folder / FILE_NAME).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def take_up(self, folder: str) -> None:
        """Continue with the sums of a checkpoint; one of the stock Trainer has none."""
        path = Path(folder) / FILE_NAME
        if path.exists():
            self._beginning = json.loads(path.read_text(encoding="utf-8"))
            self.start_over()


def _share(sums: Sequence[float]) -> float:
    """Return this rank's sum of those of the ranks that saved them; their mean for another number of ranks."""
    return sums[rank()] if len(sums) == world_size() else sum(sums) / len(sums)
