"""What all parts share: the place of a run, the front door of training, and data."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "qwenvl" / "train" / "train_qwen.py"
Row = dict[str, Any]
"""Figures of an item; ``passed`` is its verdict where it has one."""

_SETTINGS: dict[str, Any] = {
    "dataset_use": "noise",
    "tune_mm_llm": True,
    "tune_mm_mlp": True,
    "tune_mm_vision": True,
    "min_pixels": "32*32",
    "data_flatten": True,
    "model_max_length": 4096,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "save_strategy": "no",
    "dataloader_num_workers": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "verify_export": False,
}


class SkippedError(Exception):
    """An item that cannot run here, with the reason."""


@dataclass(frozen=True)
class Place:
    """Where a run takes place.

    Args:
        work: Folder for checkpoints and data, which later parts use again.
        rehearsal: Whether sizes are tiny and the device is the CPU.
    """

    work: Path
    rehearsal: bool

    @property
    def device(self) -> torch.device:
        """Device of the run."""
        return torch.device("cpu" if self.rehearsal else "cuda")

    def require_cuda(self, what: str) -> None:
        """Leave an item out where there is no GPU."""
        if self.rehearsal:
            raise SkippedError(f"{what} needs a GPU")


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Args:
        items: Items, each run by itself.
        run: Function of the place and an item that returns its figures.
        usual: Seconds of an item on a GPU. It does not start with less time left.
        seconds: Limit of an item.
        together: Number of items run at a time; the first runs alone, as others may compare with it. More than 1 where
            no figure is a time or the memory of a device.
        rehearsed: Items of a rehearsal; None for all.
    """

    items: Sequence[str]
    run: Callable[[Place, str], Row]
    usual: float = 40.0
    seconds: float = 240.0
    together: int = 1
    rehearsed: Sequence[str] | None = None

    def items_at(self, place: Place) -> Sequence[str]:
        """Return the items that run at a place."""
        return self.rehearsed if place.rehearsal and self.rehearsed is not None else self.items

    def groups(self, items: Sequence[str], cores: int) -> list[Sequence[str]]:
        """Return the given items of the part in groups that run at the same time, each item on 4 cores."""
        size = max(1, min(self.together, cores // 4))
        first = int([*items[:1]] == [*self.items[:1]])
        rest = [items[start : start + size] for start in range(first, len(items), size)]
        return [items[:1], *rest] if first else rest


def require_package(name: str) -> None:
    """Leave an item out if a package is missing."""
    if importlib.util.find_spec(name) is None:
        raise SkippedError(f"{name} is not installed")


@contextmanager
def alone(place: Place) -> Iterator[None]:
    """Let one process at a time make what several use."""
    with (place.work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tiny_checkpoint(place: Place, family: str) -> Path:
    """Return a tiny checkpoint of a family, made once."""
    folder = place.work / "tiny" / family
    with alone(place):
        if not (folder / "model.safetensors").exists():
            build_tiny_checkpoint(family, folder)
    return folder


def noise(place: Place, name: str, rows: int, words: int, *, side: int, images: bool = True) -> Path:
    """Return a registry of a dataset ``noise``, made once: images of noise, with answers from short to long.

    Args:
        place: Where to write it.
        name: Name of its folder.
        rows: Number of rows.
        words: Words of the longest answer.
        side: Side of the images, in pixels.
        images: Whether rows have images.
    """
    folder = place.work / "data" / name
    with alone(place):
        if not (folder / "registry.py").exists():
            _make_noise(folder, rows, words, side, images=images)
    return folder / "registry.py"


def _make_noise(folder: Path, rows: int, words: int, side: int, *, images: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random, records = np.random.default_rng(0), []
    for number in range(rows):
        answer = " ".join(f"w{word}" for word in random.integers(0, 99, random.integers(words // 8, words)))
        question = f"Number {number}: what is it?"
        record: Row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        if images:
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side, side)).save(folder / f"{number}.jpg")
            record["image"] = f"{number}.jpg"
            record["conversations"][0]["value"] = f"<image>\n{question}"
        records.append(record)
    (folder / "noise.json").write_text(json.dumps(records))
    entry = {"noise": {"annotation_path": str(folder / "noise.json"), "data_path": str(folder)}}
    (folder / "registry.py").write_text(f"data_dict = {entry!r}\n")


def flags(place: Place, model: Path, registry: Path, output: Path, **settings: Any) -> list[str]:
    """Return the flags of a training run; None leaves one out."""
    named = {"model_name_or_path": model, "output_dir": output, "dataset_registry": registry, **_SETTINGS, **settings}
    if place.rehearsal:
        named["use_cpu"] = True
    return [text for name, value in named.items() if value is not None for text in (f"--{name}", str(value))]


def emptied(folder: Path) -> Path:
    """Return an output folder without what an item that was stopped left there, from which training would resume."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def start(arguments: Sequence[str], *, ranked: bool = False) -> subprocess.Popen[str]:
    """Start training in a process of its own.

    Args:
        arguments: Flags.
        ranked: Whether it is rank 0 of 1, as engines need.
    """
    environment: dict[str, str] = dict(os.environ)
    if ranked:
        port = str(20_000 + os.getpid() % 9_000)
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(TRAIN), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(arguments: Sequence[str], *, ranked: bool = False) -> str:
    """Train to the end, and return what was printed.

    Raises:
        RuntimeError: Training failed; the message is the end of its output.
    """
    process = start(arguments, ranked=ranked)
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {printed[-1500:]}")
    return printed


def logged(output: Path, name: str) -> list[float]:
    """Return the logged values of a run by name, in order."""
    history: list[Mapping[str, Any]] = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in history if name in line]
