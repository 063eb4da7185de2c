"""Tables of ``--dry_run`` in addition to those of every run: work, and memory of each device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.table import Table

from qwenvl.config import TrainingArguments
from qwenvl.profiling.activation_memory import StepMemory
from qwenvl.profiling.device_specs import known_peak, name_device
from qwenvl.profiling.flops import Flops
from qwenvl.profiling.state_memory import StateMemory, StateSharding
from qwenvl.train.schedule import Schedule
from qwenvl.utils.tables import pairs, table

_ASSUMED_PEAK = 989.5e12


def describe_work(
    flops: Flops, measures: np.ndarray, schedule: Schedule, args: TrainingArguments, imbalance: float
) -> Table:
    """Return a table of operations, hours and balance.

    Args:
        flops: Costs of samples.
        measures: Measures of every index of an epoch.
        schedule: Schedule of the run.
        args: Arguments of the run.
        imbalance: Work of the slowest rank in a step / mean over ranks.
    """
    ranks = schedule.ranks
    vision, language = (float(part.sum()) * schedule.epochs for part in flops.split(measures))
    known = args.device_peak_tflops * 1e12 if args.device_peak_tflops else known_peak(name_device(args.device))
    peak = known or _ASSUMED_PEAK
    hours = count_hours(vision + language, imbalance, ranks, peak * args.dry_run_mfu)
    device = "" if known else ", those of a H100 in bfloat16 (--device_peak_tflops for another)"
    share = f"{args.dry_run_mfu:.0%} (--dry_run_mfu) of {peak / 1e12:g} TFLOP/s"
    return pairs(
        "Work",
        {
            "operations": f"{vision + language:.3g} FLOP, {vision / (vision + language):.1%} of them in vision tower "
            "and mergers",
            "balance": f"{imbalance:.3f}, the slowest of {ranks} devices over the mean" if ranks > 1 else "",
            "hours": f"{hours:.3g} on {ranks} devices that reach {share}{device}",
        },
    )


def count_hours(operations: float, imbalance: float, ranks: int, speed: float) -> float:
    """Return the hours of a run.

    Args:
        operations: Floating point operations of the run.
        imbalance: Work of the slowest rank in a step / mean over ranks.
        ranks: Number of devices.
        speed: Operations per second that each device reaches.
    """
    return operations * imbalance / (ranks * speed) / 3600


def describe_histories(measures: Mapping[str, np.ndarray]) -> Table:
    """Return a table of training rows and tokens for each value of ``--history``.

    Args:
        measures: Measures of the samples of an epoch, by the value of ``--history``.
    """
    rows = []
    for history, part in measures.items():
        counts = (int(part[field].sum()) for field in ("rows", "tokens", "trained_tokens"))
        rows.append([history, *(f"{count:,}" for count in counts)])
    return table("Conversations with several contexts", ["--history", "rows", "tokens", "trained"], rows)


def memory_parts(states: StateMemory, step: StepMemory) -> dict[str, int]:
    """Return the bytes of a device by part, which add up to its peak."""
    parts = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations of the heaviest batch": step.activations,
        "logits": step.logits,
        "16-bit copies of weights, buffers": states.buffers,
    }
    of_step = states.step - step.activations - step.logits - states.buffers  # the optimizer steps when they are freed
    if of_step > 0:
        parts["more than these three, in the optimizer's step"] = of_step
    return parts


def describe_memory(sharding: StateSharding, states: StateMemory, step: StepMemory) -> Table:
    """Return a table of a device's memory by part, their sum, and the size of a checkpoint."""
    parts = memory_parts(states, step)
    rows = [[name, gib(size)] for name, size in (*parts.items(), ("all", sum(parts.values())))]
    rows.append(["a checkpoint, on disk", gib(states.checkpoint)])
    return table(f"Memory of each device with {sharding.name}", ["what", "takes"], rows)


NOT_COUNTED = "Not included: libraries (CUDA, NCCL) and fragmentation, often 2 GiB per device."


def gib(size: int) -> str:
    """Format a number of bytes, in GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:,.1f} MiB"
