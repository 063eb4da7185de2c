"""How long a run is: its optimizer steps, counted before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qwenvl.config import TrainingArguments
from qwenvl.data.sampler import SampleOrder, Sharding, costs_of_ranks, imbalance


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a run is.

    Args:
        indices: rows or packs of an epoch.
        ranks: devices.
        step_size: rows or packs of an optimizer step, over all ranks.
        steps_of_epoch: optimizer steps of an epoch.
        steps: of the whole run.
    """

    indices: int
    ranks: int
    step_size: int
    steps_of_epoch: int
    steps: int

    @property
    def epochs(self) -> float:
        """How often the data are used."""
        return self.steps / self.steps_of_epoch

    def steps_between(self, given: float) -> int:
        """Return the steps of a distance that flags give in steps, or below 1 as a share of the run."""
        return math.ceil(self.steps * given) if given < 1 else int(given)


def plan_schedule(indices: int, args: TrainingArguments, ranks: int) -> Schedule:
    """Return how many steps there are; the Trainer counts as many.

    Args:
        indices: rows or packs of an epoch.
        args: of the run.
        ranks: devices.
    """
    step_size = args.train_batch_size * args.gradient_accumulation_steps * ranks
    of_epoch = -(-indices // step_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * of_epoch)
    return Schedule(indices, ranks, step_size, of_epoch, steps)


def slowest_over_mean(order: SampleOrder, costs: np.ndarray, args: TrainingArguments, ranks: int) -> float:
    """Return how long the slowest rank works in a step, over the mean of all; 1 for one rank.

    Args:
        order: of the indices.
        costs: float64, what each of them costs.
        args: of the run.
        ranks: devices.
    """
    if ranks == 1:
        return 1.0
    sharding = Sharding(args.train_batch_size, ranks, 0, args.gradient_accumulation_steps)
    return imbalance(costs_of_ranks(costs, order.steps(0, sharding.step_size), sharding))
