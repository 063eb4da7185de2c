"""What ``--dry_run`` says, as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qwenvl.arguments import TrainingArguments
from qwenvl.data.collation import Event
from qwenvl.data.dataset import ConversationDataset
from qwenvl.models.device_peak import known_peak, name_device
from qwenvl.models.flops import Flops
from qwenvl.models.step_memory import StepMemory
from qwenvl.train.state_memory import Sharing, StateMemory

_ASSUMED_PEAK = 989.5e12


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long the run is.

    Args:
        indices: rows or packs of an epoch.
        steps_of_epoch: optimizer steps of an epoch.
        steps: of the whole run.
        imbalance: how long the slowest rank works in a step, over the mean; 1 for one rank.
    """

    indices: int
    steps_of_epoch: int
    steps: int
    imbalance: float

    @property
    def epochs(self) -> float:
        """How often the data are used."""
        return self.steps / self.steps_of_epoch


def describe_data(rows: ConversationDataset, measures: np.ndarray, events: Sequence[Event]) -> Iterator[str]:
    """Yield what there is to train on, exactly, and what is left out.

    Args:
        rows: not packed.
        measures: of every row.
        events: what there is to report of them.
    """
    borders = np.cumsum([0, *(len(table.rows) for table in rows.tables)])
    parts = {
        table.table.spec.name: measures[borders[number] : borders[number + 1]]
        for number, table in enumerate(rows.tables)
    }
    if len(rows.tables) > 1:
        parts["all"] = measures
    yield f"{'dataset':<24}{'rows':>12}{'samples':>12}{'tokens':>16}{'trained':>14}{'patches':>14}{'longest':>10}"
    for name, part in parts.items():
        sums = [int(part[field].sum()) for field in ("samples", "tokens", "trained_tokens", "patches")]
        counts = f"{len(part):>12,}{sums[0]:>12,}{sums[1]:>16,}{sums[2]:>14,}{sums[3]:>14,}"
        yield f"{name:<24}{counts}{int(part['tokens'].max(initial=0)):>10,}"
    left_out = Counter((event.dataset, event.record["category"]) for event in events if event.record)
    for (name, category), count in sorted(left_out.items()):
        yield f"left out of {name}: {count:,} ({category.replace('_', ' ')})"


def describe_schedule(schedule: Schedule, fill: float | None, args: TrainingArguments, ranks: int) -> Iterator[str]:
    """Yield packs and steps.

    Args:
        schedule: of the run.
        fill: share of the packs that tokens take; None without packs.
        args: of the run.
        ranks: devices.
    """
    batch = f"{args.train_batch_size} x {args.gradient_accumulation_steps} x {ranks} devices"
    indices = f"{schedule.indices:,} rows" if fill is None else f"{schedule.indices:,} packs, {fill:.2%} full,"
    yield f"{indices} an epoch, {batch} a step: {schedule.steps_of_epoch:,} steps an epoch"
    yield f"{schedule.steps:,} steps in all, {schedule.epochs:.2f} epochs"
    if ranks > 1:
        yield f"slowest of {ranks} devices over the mean: {schedule.imbalance:.3f}"


def describe_work(
    flops: Flops, measures: np.ndarray, schedule: Schedule, args: TrainingArguments, ranks: int
) -> Iterator[str]:
    """Yield operations and hours."""
    vision, language = (float(part.sum()) * schedule.epochs for part in flops.split(measures))
    yield f"{vision + language:.3g} FLOP, {vision / (vision + language):.1%} of them in vision tower and mergers"
    known = args.device_peak_tflops * 1e12 if args.device_peak_tflops else known_peak(name_device(args.device))
    peak = known or _ASSUMED_PEAK
    hours = (vision + language) * schedule.imbalance / (ranks * peak * args.dry_run_mfu) / 3600
    device = "" if known else ", those of a H100 in bfloat16 (--device_peak_tflops for another)"
    share = f"{args.dry_run_mfu:.0%} (--dry_run_mfu) of {peak / 1e12:g} TFLOP/s"
    yield f"{hours:.3g} hours on {ranks} devices that reach {share}{device}"


def describe_memory(sharing: Sharing, states: StateMemory, step: StepMemory) -> Iterator[str]:
    """Yield the parts of a device's memory and their sum."""
    parts = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations of the heaviest batch": step.activations,
        "logits": step.logits,
    }
    yield f"memory of each device with {sharing.name}:"
    for name, size in (*parts.items(), ("all", sum(parts.values()))):
        yield f"    {name:<36}{gib(size):>14}"
    yield "    the libraries, buffers of the engine and fragments come on top, often 2 to 5 GiB"
    yield f"a checkpoint takes {gib(states.checkpoint)} on disk"


def gib(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:,.1f} MiB"
