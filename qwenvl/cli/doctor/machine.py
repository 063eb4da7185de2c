"""Checks of devices, memory and limits of the machine."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch.utils.cpp_extension import CUDA_HOME

from qwenvl.cli.doctor.findings import Finding
from qwenvl.models.loading import choose_attention
from qwenvl.profiling.device_specs import known_peak
from qwenvl.utils.cache import cache_folder
from qwenvl.utils.cores import available_cores

_GIB = 2**30
_OPEN_FILES = 4096
_SHARED_MEMORY = 8 * _GIB
_FREE_DISK = 20 * _GIB


def check_devices() -> Iterator[Finding]:
    """Yield the accelerators and their problems."""
    if not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        )
        driver = Path("/proc/driver/nvidia/version").exists()
        advice = (
            "the driver is older than torch's CUDA: install a newer one, or a torch for an older CUDA" if driver else ""
        )
        yield Finding("bad" if driver else "note", "GPU", f"none that torch can use ({built})", advice)
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found = f"{properties.name}, {total / _GIB:.0f} GiB, capability {properties.major}.{properties.minor}"
        if free < 0.9 * total:
            yield Finding(
                "warning", f"GPU {number}", found, f"{(total - free) / _GIB:.1f} GiB in use by other processes"
            )
        elif properties.major < 8:
            yield Finding("warning", f"GPU {number}", found, "no bfloat16 in hardware: train with --fp16 True")
        elif known_peak(properties.name) is None:
            yield Finding("note", f"GPU {number}", found, "its peak TFLOPS are unknown: MFU needs --device_peak_tflops")
        else:
            yield Finding("good", f"GPU {number}", found)
    chosen = choose_attention()
    advice = "one call per sample: slow with packs of many samples" if chosen == "sdpa" else ""
    yield Finding("note" if advice else "good", "attention in bf16 or fp16", chosen, advice)


def check_host() -> Iterator[Finding]:
    """Yield cores, memory, shared memory, limits and disk."""
    cores, ranks = available_cores(), max(1, torch.cuda.device_count() if torch.cuda.is_available() else 1)
    few = cores < 4 * ranks
    advice = (
        f"fewer than 4 per device: decoding may not keep up with {ranks} device(s); watch data_wait_share"
        if few
        else ""
    )
    yield Finding("note" if few else "good", "CPU cores", str(cores), advice)
    memory = psutil.virtual_memory()
    yield Finding("good", "memory", f"{memory.available / _GIB:.0f} of {memory.total / _GIB:.0f} GiB free")
    yield from _check_shared_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft < _OPEN_FILES
    yield Finding(
        "warning" if low else "good",
        "open files",
        f"up to {soft}",
        f"workers and shards may need more: ulimit -n {hard}" if low else "",
    )
    free = shutil.disk_usage(_existing(cache_folder(None))).free
    little = free < _FREE_DISK
    yield Finding(
        "warning" if little else "good",
        "disk of the cache",
        f"{free / _GIB:.0f} GiB free",
        f"too little for the indexes of big datasets: set --data_cache_dir, now {cache_folder(None)}" if little else "",
    )


def _check_shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    little = free < _SHARED_MEMORY
    advice = "workers pass batches through it, and die if it is full: docker run --shm-size=16g" if little else ""
    yield Finding("warning" if little else "good", "/dev/shm", f"{free / _GIB:.1f} GiB free", advice)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def check_compilers() -> Iterator[Finding]:
    """Yield the compilers with which DeepSpeed builds its AdamW for the CPU, at the first step with offload."""
    compiler = os.environ.get("CXX", "c++")
    missing = [] if shutil.which(compiler) else [f"a C++ compiler ({compiler})"]
    if torch.version.cuda and (CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists()):
        missing.append(f"nvcc of CUDA {torch.version.cuda}")
    advice = "needed by configs/zero3_offload.json; set CUDA_HOME, or load the cluster's CUDA module" if missing else ""
    found = f"missing: {', '.join(missing)}" if missing else "found"
    yield Finding("note" if missing else "good", "compilers for offload", found, advice)


def check_launcher() -> Iterator[Finding]:
    """Yield the available scheduler and the settings of the launcher."""
    if shutil.which("sbatch"):
        yield Finding("good", "SLURM", "sbatch is available: scripts/slurm/sft.sbatch")
    if os.environ.get("OMP_NUM_THREADS") is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield Finding("note", "OMP_NUM_THREADS", "not set", "each rank uses all cores for single operations")
