"""Tiny training by every engine on one rank: stopped by SIGTERM and resumed, it ends like one that was not stopped."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.gpu_parts.base import (
    Part,
    Place,
    Row,
    emptied,
    flags,
    noise,
    require_package,
    start,
    tiny_checkpoint,
    train,
)
from qwenvl.train.callbacks.preemption import EXIT_CODE

ENGINES: dict[str, dict[str, Any]] = {
    "one process": {},
    "DDP": {},
    "ZeRO-2": {"deepspeed": "configs/zero2.json"},
    "ZeRO-3": {"deepspeed": "configs/zero3.json"},
    "FSDP2": {"fsdp": True, "fsdp_config": "configs/fsdp2.json"},
}
_STEPS = 40
_CLOSE = 0.01
"""Largest difference, as a share of what training changed. Kernels that add in any order make two runs differ, most
where a gradient is zero but for rounding, as AdamW's steps have one size. A run of one step less differs by 0.029."""


def train_by(place: Place, engine: str) -> Row:
    """Train without a stop, and with one."""
    model, registry = tiny_checkpoint(place, "qwen3_vl"), noise(place, "tiny", 16, 40, side=64)
    folder, ranked = emptied(place.work / "engines" / engine.replace(" ", "-")), engine != "one process"
    if "deepspeed" in ENGINES[engine]:
        require_package("deepspeed")
    settings = {**ENGINES[engine], "max_steps": _STEPS, "save_strategy": "steps", "save_steps": 1000}
    settings["learning_rate"] = 1e-4
    whole, stopped = folder / "whole", folder / "stopped"
    train(flags(place, model, registry, whole, **settings), ranked=ranked)
    again = flags(place, model, registry, stopped, **settings)
    step = _stop(again, stopped, ranked=ranked)
    train(again, ranked=ranked)
    row: Row = {"stopped_at": step, "difference": difference(model, whole, stopped)}
    plain = folder.parent / "one-process" / "whole"
    if plain.is_dir():
        row["from_one_process"] = difference(model, plain, whole)
    return {**row, "passed": max(row["difference"], row.get("from_one_process", 0.0)) <= _CLOSE}


def _stop(arguments: list[str], output: Path, *, ranked: bool) -> int:
    """Send SIGTERM after the first logged step; return the step of the checkpoint.

    Raises:
        RuntimeError: The run did not stop with a checkpoint.
    """
    process, printed = start(arguments, ranked=ranked), []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if "loss" in line and len(printed) > 1 and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            break
    printed += process.stdout.readlines()
    if process.wait() != EXIT_CODE:
        raise RuntimeError(f"exit code {process.returncode} after SIGTERM: {''.join(printed)[-1500:]}")
    return max(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*"))


def difference(start: Path, one: Path, other: Path) -> float:
    """Return the norm of the difference of two folders' weights, over that of what training changed in the first."""
    first, left, right = (load_file(folder / "model.safetensors") for folder in (start, one, other))
    assert first.keys() == left.keys() == right.keys()
    apart, changed = 0.0, 0.0
    for name, weight in left.items():
        apart += float((weight.double() - right[name].double()).square().sum())
        changed += float((weight.double() - first[name].double()).square().sum())
    return math.sqrt(apart / changed)


PART = Part(tuple(ENGINES), train_by, usual=90.0, together=4, rehearsed=("one process", "DDP"))
