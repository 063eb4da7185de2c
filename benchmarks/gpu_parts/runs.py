"""Training at published sizes through the front door: speed, peak memory against the dry run, seconds of saving."""

from __future__ import annotations

import gc
import re
import shutil
import statistics
import threading
import time
from pathlib import Path

import torch

from benchmarks.gpu_parts.base import Part, Place, Row, emptied, flags, logged, noise, train
from benchmarks.real_size import build, write_data
from qwenvl.train.checkpoint.folder import DRAFTS

_STEPS = 8
_SAVED_AFTER = 5
"""Step of the one checkpoint, which takes 26 GB at 2B."""
_GIB = {"MiB": 1 / 1024, "GiB": 1.0}
RUNS: dict[str, Row] = {
    "2b": {},
    "8b": {"model_dtype": "bfloat16"},  # float32 weights and AdamW of 8B need several GPUs
    "8b LoRA": {
        "lora_enable": True,
        "lora_r": 64,
        "tune_mm_llm": False,
        "tune_mm_mlp": False,
        "tune_mm_vision": False,
    },
}
"""Flags of each run, besides those of all runs; the first word is the size."""
RUNS["tiny"] = RUNS["2b"]


def train_at_size(place: Place, item: str) -> Row:
    """Train some steps of packs, and compare the peak with ``--dry_run`` of the same flags."""
    size, name = item.split()[0], item.replace(" ", "-")
    base = place.work / "sizes" / size
    if not (base / "registry.py").exists():  # written last
        base.mkdir(parents=True, exist_ok=True)
        with place.device:  # random numbers of a GPU take seconds, those of a CPU minutes
            build(base / "base", size)
        write_data(base)
        gc.collect()
        torch.cuda.empty_cache()  # the device's memory is for the training process
    length = 512 if place.rehearsal else 8192
    registry = noise(place, f"length-{length}", 16 if place.rehearsal else 256, length // 16, side=512)
    settings = {
        "data_packing": True,
        "data_flatten": None,
        "model_max_length": length,
        "max_pixels": "64*64" if place.rehearsal else "512*512",
        "per_device_train_batch_size": 1,
        "max_steps": 2 if place.rehearsal else _STEPS,
        "learning_rate": 1e-5,
        "bf16": True,
        "gradient_checkpointing": True,
        "optim": "adamw_torch_fused",
        **(
            {"save_strategy": "steps", "save_steps": _SAVED_AFTER if not place.rehearsal else 1}
            if item in ("2b", "tiny")
            else {}
        ),
        **RUNS[item],
    }
    output = emptied(place.work / "runs" / name)
    arguments = flags(place, base / "base", registry, output, **settings)
    predicted = _dry_run(arguments)
    with _Saving(output) as saving:
        train(arguments)
    row: Row = {"predicted_gib": predicted, **_figures(output), **saving.figures()}
    if "peak_memory_gib" in row:
        row["peak_over_predicted"] = round(row["peak_memory_gib"] / predicted, 3)
    shutil.rmtree(output)  # the next run needs the room
    return row


def _dry_run(arguments: list[str]) -> float:
    """Return the GiB of a device that the dry run predicts."""
    printed = train([*arguments, "--dry_run"])
    found = re.search(r"(?m)^ *all +([\d.,]+) (\w+) *$", printed)
    if found is None:
        raise RuntimeError(f"The dry run printed no sum of memory: {printed[-1500:]}")
    return round(float(found[1].replace(",", "")) * _GIB[found[2]], 3)


def _figures(output: Path) -> Row:
    """Return medians over the steps after the first two, and the largest peak of memory."""
    row: Row = {}
    for name in ("tokens_per_second", "trained_tokens_per_second", "mfu", "data_wait_share"):
        values = logged(output, name)
        if values:
            row[name] = statistics.median(values[2:] or values)
    peaks = logged(output, "peak_memory_gib")
    return {**row, "peak_memory_gib": max(peaks)} if peaks else row


class _Saving(threading.Thread):
    """Watches an output folder, and measures from the first file of a checkpoint to its final name."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self._output, self._ended = output, threading.Event()
        self._first: float | None = None
        self._seconds: float | None = None
        self._bytes = 0

    def __enter__(self) -> _Saving:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Look at the folder every 20 ms."""
        while not self._ended.wait(0.02) and self._seconds is None:
            if self._first is None and [*(self._output / DRAFTS).glob("checkpoint-*")]:
                self._first = time.perf_counter()
            complete = [*self._output.glob("checkpoint-*")]
            if complete and self._first is not None:
                self._seconds = time.perf_counter() - self._first
                files = complete[0].rglob("*")
                self._bytes = sum(path.stat().st_size for path in files if path.is_file())

    def figures(self) -> Row:
        """Return seconds and size of the first checkpoint, if there was one."""
        if self._seconds is None:
            return {}
        return {"saving_seconds": round(self._seconds, 2), "checkpoint_gib": round(self._bytes / 2**30, 3)}


PART = Part(("2b", "8b", "8b LoRA"), train_at_size, usual=150.0, seconds=420.0, rehearsed=("tiny",))
