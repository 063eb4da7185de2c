"""Measure what follows the writing of a checkpoint, and estimate whole checkpoints of large models.

    python benchmarks/checkpoint.py --folder DIR [--size 2b|4b|8b|tiny] [--ranks 8] [--paper]

Writes into DIR what rank 0 of a ZeRO-3 run leaves at the given size: the weights in bfloat16, and its share of AdamW's
float32 state, in files of at most 1.5 GB. Measures writing, publishing (the manifest, for which ranks wait), the hashes
of every byte (in the background; in blocks, and of whole files for comparison), and both kinds of check before a run
resumes. Files are in the page cache, so that hashing is measured, not the disk. DIR is removed at the end.

``--paper`` prints the table of large models from the rates below, without measuring anything.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.step_samples import SIZES, make_config
from qwenvl.train.checkpoint import manifest

FILE = 5 * 10**9
ONE_WRITER, MACHINE, HASH = 1.0, 4.0, 0.5
"""Assumed rates in GB/s: one process that writes, all processes of a machine together, and one thread that hashes."""

MODELS = (("32B", 33.4, 8), ("32B", 33.4, 16), ("235B-A22B", 235.7, 64))
"""Name, billions of weights, and GPUs, in machines of 8."""


def main() -> None:
    """Measure, or estimate, and print a line of JSON per stage or a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--paper", action="store_true")
    arguments = parser.parse_args()
    if arguments.paper:
        sys.stdout.write("\n".join(paper()) + "\n")
        return
    if arguments.folder is None or arguments.folder.exists():
        parser.error("--folder must name a folder that does not exist yet")
    try:
        measure(arguments.folder, arguments.size, arguments.ranks)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def measure(folder: Path, size: str, ranks: int) -> None:
    """Write the files of a rank, and time all that happens to them."""
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(make_config(size))
    weights = sum(parameter.numel() for parameter in model.parameters())
    folder.mkdir(parents=True)
    timed("write", 2 * weights + 12 * weights // ranks, lambda: write(folder, weights, ranks))
    total = sum(file.stat().st_size for file in folder.iterdir())
    files = list(folder.iterdir())
    timed("publish: sizes, small files, samples", total, lambda: manifest.write(folder))
    timed("check before resuming, fast", total, lambda: manifest.problem_of(folder, every_byte=False))
    timed("every byte, in blocks", total, lambda: manifest.add_blocks(folder))
    timed("check before resuming, full", total, lambda: manifest.problem_of(folder))
    timed("every byte, a thread per file", total, lambda: whole_files(files))


def write(folder: Path, weights: int, ranks: int) -> None:
    """Write weights in bfloat16, and one rank's state in float32."""
    left = 2 * weights
    number = 0
    while left:
        part = min(left, 15 * 10**8)
        save_file({"weight": torch.empty(part // 2, dtype=torch.bfloat16).fill_(0.5)}, folder / f"model-{number}.st")
        left -= part
        number += 1
    for name in ("master", "exp_avg", "exp_avg_sq"):
        torch.save(torch.full((weights // ranks,), 0.1), folder / f"{name}.pt")


def whole_files(files: list[Path]) -> None:
    """Hash each file in a thread."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: manifest._hash(file, [(0, file.stat().st_size)]), files))


def timed(stage: str, size: int, function: Callable[[], object]) -> None:
    """Call a function and print its time, its rate and the memory of this process."""
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    memory = psutil.Process().memory_info().rss / 2**30
    line = {
        "stage": stage,
        "gigabytes": round(size / 1e9, 2),
        "seconds": round(seconds, 2),
        "gigabytes_per_second": round(size / 1e9 / seconds, 2),
        "resident_gib": round(memory, 2),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def paper() -> Iterator[str]:
    """Yield the table of checkpoints of large models."""
    yield (
        "| model | engine | files | rank 0 writes | each rank writes | host memory of rank 0 | writing "
        "| hash of every byte | publishing |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, billions, gpus in MODELS:
        for engine, (zero, each, held, files) in {
            "ZeRO-3": (2.0, 12.0 / gpus, 2.0, gpus),
            "FSDP2, `FULL_STATE_DICT`": (16.0, 0.0, 8.0, 1),
            "FSDP2, `SHARDED_STATE_DICT`": (4.0, 12.0 / gpus, 4.0, gpus),
        }.items():
            total = billions * (zero + each * gpus)
            writing = billions * zero / ONE_WRITER + billions * each * min(gpus, 8) / MACHINE
            # 8 threads, and no more of them than large files
            hashing = max(total / HASH / 8, billions * 8 / HASH if engine.endswith("`FULL_STATE_DICT`") else 0)
            large = files + billions * zero / (FILE / 1e9)
            publishing = large * 64 * 2**20 / 1e9 / HASH / 8 + 1
            yield (
                f"| {name}, {gpus} GPUs | {engine} | {total:,.0f} GB | {billions * zero:,.0f} GB "
                f"| {billions * each:,.0f} GB | {billions * held:,.0f} GB | {writing:,.0f} s | {hashing:,.0f} s "
                f"| {publishing:,.0f} s |"
            )


if __name__ == "__main__":
    main()
