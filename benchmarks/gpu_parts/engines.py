"""Tiny training by every engine on one rank: stopped by SIGTERM and resumed, it ends like one that was not stopped."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.gpu_parts.base import Part, Place, Row, flags, noise, start, tiny_checkpoint, train
from qwenvl.train.callbacks.preemption import EXIT_CODE

ENGINES: dict[str, dict[str, Any]] = {
    "one process": {},
    "DDP": {},
    "ZeRO-2": {"deepspeed": "configs/zero2.json"},
    "ZeRO-3": {"deepspeed": "configs/zero3.json"},
    "FSDP2": {"fsdp": True, "fsdp_config": "configs/fsdp2.json"},
}
_STEPS = 40
_CLOSE = 1e-4
"""Largest difference of a weight; kernels that add in any order make two runs differ in their last digits."""


def train_by(place: Place, engine: str) -> Row:
    """Train without a stop, and with one."""
    model, registry = tiny_checkpoint(place, "qwen3_vl"), noise(place, "tiny", 16, 40, side=64)
    folder, ranked = place.work / "engines" / engine.replace(" ", "-"), engine != "one process"
    settings = {**ENGINES[engine], "max_steps": _STEPS, "save_strategy": "steps", "save_steps": 1000}
    whole, stopped = folder / "whole", folder / "stopped"
    train(flags(place, model, registry, whole, **settings), ranked=ranked)
    again = flags(place, model, registry, stopped, **settings)
    step = _stop(again, stopped, ranked=ranked)
    train(again, ranked=ranked)
    row: Row = {"stopped_at": step, "difference": largest_difference(whole, stopped)}
    plain = folder.parent / "one-process" / "whole"
    if plain.is_dir():
        row["from_one_process"] = largest_difference(whole, plain)
    return {**row, "passed": row["difference"] <= _CLOSE and row.get("from_one_process", 0.0) <= 10 * _CLOSE}


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


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference of a weight of two folders."""
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


PART = Part(tuple(ENGINES), train_by, rehearsed=("one process", "DDP"))
