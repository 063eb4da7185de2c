"""A training run of two steps on a tiny checkpoint, and a test of the connection between ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from qwenvl.cli.doctor.findings import Finding
from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint

_ROOT = Path(__file__).resolve().parents[3]
_SECONDS = 300
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_training() -> Iterator[Finding]:
    """Yield the result of two training steps on images and text, run and saved in a separate process."""
    with tempfile.TemporaryDirectory(prefix="qwenvl-doctor-") as name:
        command = _prepare(Path(name))
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHED}
        started = time.monotonic()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            yield Finding("bad", "training", f"two steps take more than {_SECONDS} s", "a device or disk that hangs?")
            return
        seconds = time.monotonic() - started
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a message"])[-1]
        yield Finding("bad", "training", f"two steps on a tiny model fail: {last}", f"run it: {' '.join(command[1:4])}")
    else:
        yield Finding("good", "training", f"two steps on a tiny model, saved, in {seconds:.0f} s with all imports")


def _prepare(folder: Path) -> list[str]:
    """Write checkpoint and data; return the command line."""
    build_tiny_checkpoint("qwen3_vl", folder / "model")
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A gradient."}]
    text = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"image": "a.png", "conversations": turns}, {"conversations": text}]
    (folder / "data.json").write_text(json.dumps(2 * rows), encoding="utf-8")
    entry = {"annotation_path": str(folder / "data.json"), "data_path": str(folder)}
    (folder / "registry.py").write_text(f"data_dict = {{'trial': {entry!r}}}\n", encoding="utf-8")
    flags = {
        "model_name_or_path": folder / "model",
        "output_dir": folder / "out",
        "dataset_registry": folder / "registry.py",
        "data_cache_dir": folder / "cache",
        "dataset_use": "trial",
        "tune_mm_llm": True,
        "tune_mm_mlp": True,
        "tune_mm_vision": True,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "data_flatten": True,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "verify_export": False,
    }
    script = str(_ROOT / "qwenvl" / "train" / "train_qwen.py")
    return [sys.executable, script, *(str(text) for name, value in flags.items() for text in (f"--{name}", value))]


def check_network() -> Iterator[Finding]:
    """Yield latency and bandwidth between the ranks of torchrun; every rank has to call it."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Finding("note", "network of ranks", "not tested", "torchrun --nproc_per_node=N tools/doctor.py tests it")
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    number = torch.full((1,), float(rank), device=device)
    dist.all_reduce(number)
    right = number.item() == size * (size - 1) / 2
    latency = _seconds_of_sum(torch.zeros(1, device=device))
    volume = torch.zeros(16 << 20, device=device)  # 64 MiB
    bandwidth = 2 * (size - 1) / size * volume.nbytes / _seconds_of_sum(volume)
    dist.destroy_process_group()
    found = f"{size} ranks over {'NCCL' if cuda else 'gloo'}: {1e6 * latency:.0f} us, {bandwidth / 1e9:.1f} GB/s"
    slow = cuda and bandwidth < 10e9
    if not right:
        yield Finding("bad", "network of ranks", found, "ranks do not agree on a sum")
    elif slow:
        yield Finding("warning", "network of ranks", found, "slow for GPUs: NCCL_DEBUG=INFO shows the transport in use")
    else:
        yield Finding("good", "network of ranks", found)


def _seconds_of_sum(values: torch.Tensor, times: int = 5) -> float:
    """Return the mean seconds of an all-reduce, after a warm-up."""
    for counted in (False, True):
        started = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        if counted:
            return (time.perf_counter() - started) / times
    raise AssertionError
