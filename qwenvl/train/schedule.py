"""Length of a run in optimizer steps, computed before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qwenvl.config import TrainingArguments
from qwenvl.data.sampler import SampleOrder, Sharding, costs_of_ranks, imbalance


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length of a run.

    Args:
        indices: Number of rows or packs per epoch.
        ranks: Number of devices.
        step_size: Number of rows or packs per optimizer step, over all ranks.
        steps_of_epoch: Number of optimizer steps per epoch.
        steps: Number of optimizer steps of the whole run.
    """

    indices: int
    ranks: int
    step_size: int
    steps_of_epoch: int
    steps: int

    @property
    def epochs(self) -> float:
        """Number of passes over the data."""
        return self.steps / self.steps_of_epoch

    def steps_between(self, given: float) -> int:
        """Return an interval in steps; flags give it in steps, or as a share of the run if below 1."""
        return math.ceil(self.steps * given) if given < 1 else int(given)


def plan_schedule(indices: int, args: TrainingArguments, ranks: int) -> Schedule:
    """Return the schedule of a run, with the same number of steps as the Trainer.

    Args:
        indices: Number of rows or packs per epoch.
        args: Arguments of the run.
        ranks: Number of devices.
    """
    step_size = args.train_batch_size * args.gradient_accumulation_steps * ranks
    of_epoch = -(-indices // step_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * of_epoch)
    return Schedule(indices, ranks, step_size, of_epoch, steps)


def slowest_over_mean(order: SampleOrder, costs: np.ndarray, args: TrainingArguments, ranks: int) -> float:
    """Return work of the slowest rank in a step / mean over ranks; 1 for one rank.

    Args:
        order: Order of the indices.
        costs: float64 [indices], cost of each index.
        args: Arguments of the run.
        ranks: Number of devices.
    """
    if ranks == 1:
        return 1.0
    sharding = Sharding(args.train_batch_size, ranks, 0, args.gradient_accumulation_steps)
    return imbalance(costs_of_ranks(costs, order.steps(0, sharding.step_size), sharding))
