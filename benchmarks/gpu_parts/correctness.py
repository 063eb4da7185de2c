"""The same numbers on CPU and GPU, and no waits of the host in a micro-batch."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import TrainerCallback

from benchmarks.gpu_parts.base import REPOSITORY, Part, Place, Row, flags, noise, tiny_checkpoint
from qwenvl.config import arguments_to_yaml, parse_arguments
from qwenvl.data.collator import for_model
from qwenvl.data.encoding.processor import processor_limits
from qwenvl.families import FAMILIES, get_family
from qwenvl.profiling.sync_counter import SyncCounter
from qwenvl.tasks.objective import causal_loss
from qwenvl.train.build.data import open_config, open_data
from qwenvl.train.build.model import open_model
from qwenvl.train.checkpointing_trainer import Records
from qwenvl.train.run import build_trainer
from qwenvl.train.trainer import Trainer

_CLOSE = 1e-3
"""Largest relative difference of a gradient in float32, of sums in another order."""
_NOISE = 1e-6
"""Share of the norm of all gradients below which one is rounding."""


def check_machine(place: Place, _: str) -> Row:
    """Run the doctor."""
    command = [sys.executable, str(REPOSITORY / "tools" / "doctor.py")]
    if place.rehearsal:
        command.append("--skip_training")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _, found, verdict = done.stdout.partition("Verdict: ")
    if not found:
        raise RuntimeError(done.stderr[-1500:])
    return {"passed": not done.returncode, "said": verdict.splitlines()}


def compare_devices(place: Place, family: str) -> Row:
    """Compare loss and gradients in float32 of the CPU with those of the device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    trainer = _open(place, family, bf16=None)
    batch = for_model(next(iter(trainer.get_train_dataloader())))  # prepared in the loader
    losses, gradients = [], []
    for device in (torch.device("cpu"), place.device):
        model = trainer.model.to(device)
        model.zero_grad()
        moved = tree_map(lambda value, to=device: value.to(to) if torch.is_tensor(value) else value, dict(batch))
        loss = causal_loss(model, moved, num_trained_tokens=100.0)
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: value.grad.cpu().clone() for name, value in _trained(model)})
    noise_floor = _NOISE * float(torch.stack([one.norm() for one in gradients[0].values()]).norm())
    differences = {
        name: float((one - gradients[1][name]).norm() / (one.norm() + noise_floor))
        for name, one in gradients[0].items()
    }
    worst = max(differences, key=lambda name: differences[name])
    loss_difference = abs(losses[0] - losses[1]) / losses[0]
    return {
        "loss": losses[0],
        "loss_difference": loss_difference,
        "worst_gradient": worst,
        "gradient_difference": differences[worst],
        "passed": max(loss_difference, differences[worst]) < _CLOSE,
    }


def count_waits(place: Place, item: str) -> Row:
    """Count the waits of the host in a micro-batch of the trainer, after the first."""
    family, layout = item.split()
    settings = {"data_flatten": layout == "flattened", "gradient_checkpointing": True, "max_steps": 2}
    trainer = _open(place, family, **settings, gradient_accumulation_steps=2)
    micro = _Micro(trainer.model, place.device)
    trainer.add_callback(micro)
    trainer.train()
    waits = micro.waits[-1]
    return {"waits": sum(waits.values()), "where": sorted(waits), "passed": not waits}


class _Micro(TrainerCallback):
    """Counts waits from the first micro-batch of a step to the start of its second."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.waits: list[dict[str, int]] = []
        self._counter, self._cuda = SyncCounter((*model.parameters(), *model.buffers())), device.type == "cuda"
        self._recording = warnings.catch_warnings(record=True)
        self._warned: list[warnings.WarningMessage] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counter.waits.clear()
        self._recording = warnings.catch_warnings(record=True)
        self._warned = self._recording.__enter__() or []
        warnings.simplefilter("always")
        self._counter.__enter__()
        if self._cuda:
            torch.cuda.set_sync_debug_mode("warn")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._cuda:
            torch.cuda.set_sync_debug_mode("default")
        self._counter.__exit__(None, None, None)
        self._recording.__exit__(None, None, None)
        said = [one for one in self._warned if "called a synchronizing CUDA operation" in str(one.message)]
        places = Counter(f"CUDA waits at {one.filename}:{one.lineno}" for one in said)
        self.waits.append(dict(self._counter.waits) | dict(places))


def _open(place: Place, family: str, **settings: Any) -> Trainer:
    """Return the trainer of a tiny run."""
    registry = noise(place, "tiny", 16, 40, side=64)
    chosen = {"bf16": True, "dataloader_num_workers": 0, **settings}
    arguments = flags(place, tiny_checkpoint(place, family), registry, place.work / "opened" / family, **chosen)
    parsed = parse_arguments(arguments)
    config = open_config(parsed)
    data = open_data(parsed, get_family(config.model_type), config)
    model = open_model(parsed, data.processor, config, data.added_tokens, objective=data.objective)
    return build_trainer(parsed, model, data, Records(arguments_to_yaml(parsed), processor_limits(data.processor)))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.grad is not None]


MACHINE = Part(("machine",), check_machine)
EQUALITY = Part(tuple(FAMILIES), compare_devices, together=4, rehearsed=("qwen3_vl", "qwen2_5_vl"))
WAITS = Part(
    (*(f"{family} flattened" for family in FAMILIES), "qwen3_vl padded", "qwen2_5_vl padded"),
    count_waits,
    together=4,
    rehearsed=("qwen3_vl flattened",),
)
