"""Memory of weights, gradients and optimizer on each device, depending on how the engine shards them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qwenvl.config import TrainingArguments
from qwenvl.config.rules.engines import read_settings
from qwenvl.models.lora.adapters import has_adapters

_STATES = {"adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0, "paged_adamw_8bit": 2.0, "ademamix_8bit": 3.0}
_STATES |= {"lion_32bit": 4.0, "paged_lion_32bit": 4.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0, "sgd": 0.0}
_ADAM = 8.0
"""Bytes of optimizer state per trained weight: two float32 numbers for Adam and all optimizers not listed above."""


@dataclass(frozen=True, slots=True)
class StateSharding:
    """Sharding of a model's state by an engine.

    Args:
        name: Name of the engine, for display.
        stage: ZeRO stage; 0 for none, 3 also for FSDP2.
        ranks: Number of devices.
        masters: Whether DeepSpeed keeps float32 master weights.
        offloads_optimizer: Whether the optimizer's state is in host memory.
        offloads_weights: Whether the weights are in host memory.
    """

    name: str
    stage: int
    ranks: int
    masters: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False


@dataclass(frozen=True, slots=True)
class StateMemory:
    """Bytes on each device, and bytes of a checkpoint on disk from all ranks together."""

    weights: int
    gradients: int
    optimizer: int
    checkpoint: int


def read_sharding(args: TrainingArguments, ranks: int) -> StateSharding:
    """Return how the flags shard a run over a number of devices."""
    if args.fsdp:
        return StateSharding("FSDP2", 3, ranks)
    if not args.deepspeed:
        return StateSharding("DDP" if ranks > 1 else "one process", 0, ranks)
    zero = read_settings(args.deepspeed, "deepspeed")["zero_optimization"]
    stage = int(zero["stage"])
    return StateSharding(
        f"ZeRO-{stage}",
        stage,
        ranks,
        masters=True,
        offloads_optimizer=_offloads(zero, "offload_optimizer"),
        offloads_weights=_offloads(zero, "offload_param"),
    )


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def estimate_states(
    model: PreTrainedModel, sharding: StateSharding, optimizer: str, frozen: torch.dtype, trained: torch.dtype
) -> StateMemory:
    """Return the memory of a model's state.

    Args:
        model: Model with frozen and trainable parts set, on any device.
        sharding: Sharding over devices.
        optimizer: Value of ``--optim``.
        frozen: Data type of frozen weights.
        trained: Data type of trainable weights and their gradients.
    """
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    weights = counts[False] * frozen.itemsize + counts[True] * trained.itemsize
    gradients = counts[True] * trained.itemsize
    states = _optimizer_bytes(model, optimizer) + (4 * counts[True] if sharding.masters else 0)
    buckets = gradients if sharding.name == "DDP" else 0  # DDP sends copies of the gradients
    of_optimizer = 0 if sharding.offloads_optimizer else states // (sharding.ranks if sharding.stage >= 1 else 1)
    return StateMemory(
        weights=0 if sharding.offloads_weights else weights // (sharding.ranks if sharding.stage == 3 else 1),
        gradients=gradients // (sharding.ranks if sharding.stage >= 2 else 1) + buckets,
        optimizer=of_optimizer,
        checkpoint=states + (counts[True] * trained.itemsize if has_adapters(model) else weights),
    )


def _optimizer_bytes(model: nn.Module, optimizer: str) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "adafactor":  # a row and a column of each matrix
        return sum(4 * (sum(value.shape[-2:]) if value.dim() > 1 else value.numel()) for value in trained)
    return int(sum(value.numel() for value in trained) * _STATES.get(optimizer, _ADAM))
