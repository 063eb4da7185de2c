"""Memory of weights, gradients and optimizer on each device, depending on how the engine shards them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qwenvl.config import TrainingArguments
from qwenvl.config.rules.engines import read_settings, reads_on_one_rank
from qwenvl.models.lora.adapters import has_adapters
from qwenvl.models.parts import decoder_layers, layout_of, output_head

_STATES = {"adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0, "paged_adamw_8bit": 2.0, "ademamix_8bit": 3.0}
_STATES |= {
    "paged_adamw_32bit": 8.0,
    "lion_32bit": 4.0,
    "paged_lion_32bit": 4.0,
    "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0,
    "sgd": 0.0,
}
"""Bytes of optimizer state per trained weight, of optimizers that are not like Adam."""

_NF4 = 0.5 + 0.127 / 8
"""Bytes of a weight in 4 bits with its share of the scales (Dettmers et al., 2023, arXiv 2305.14314, section 3)."""


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
        sums_in_float32: Whether DeepSpeed adds up gradients in float32.
        bucket_bytes: Bytes of DeepSpeed's buffers for sums of gradients and, with stage 3, of gathered weights.
        read_once: Whether only rank 0 reads the weights (FSDP2).
    """

    name: str
    stage: int
    ranks: int
    masters: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    sums_in_float32: bool = False
    bucket_bytes: int = 0
    read_once: bool = False


@dataclass(frozen=True, slots=True)
class StateMemory:
    """Bytes on each device, and bytes of a checkpoint on disk from all ranks together.

    Args:
        weights: Weights, or the share of them.
        gradients: Gradients, or the share of them.
        optimizer: State of the optimizer, or the share of it.
        checkpoint: Files of a checkpoint.
        buffers: 16-bit copies of weights for products, and buffers of the engine.
        step: Temporary memory of the optimizer's step, when there are no activations.
    """

    weights: int
    gradients: int
    optimizer: int
    checkpoint: int
    buffers: int = 0
    step: int = 0


def read_sharding(args: TrainingArguments, ranks: int) -> StateSharding:
    """Return how the flags shard a run over a number of devices."""
    if args.fsdp:
        return StateSharding("FSDP2", 3, ranks, read_once=reads_on_one_rank(args))
    if not args.deepspeed:
        return StateSharding("DDP" if ranks > 1 else "one process", 0, ranks)
    config = read_settings(args.deepspeed, "deepspeed")
    zero = config["zero_optimization"]
    stage = int(zero["stage"])
    return StateSharding(
        f"ZeRO-{stage}",
        stage,
        ranks,
        masters=True,
        offloads_optimizer=_offloads(zero, "offload_optimizer"),
        offloads_weights=_offloads(zero, "offload_param"),
        sums_in_float32=config.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        bucket_bytes=_bucket_bytes(zero),
    )


def _bucket_bytes(zero: Mapping[str, Any]) -> int:
    """Return the bytes of buckets of 16 bits, twice where one is filled while the other is sent."""
    sizes = [zero.get("reduce_bucket_size", 5e8)] * (2 if zero.get("overlap_comm") else 1)
    if zero["stage"] == 3:
        sizes.append(zero.get("stage3_max_live_parameters", 1e9))
    return sum(int(size) * 2 for size in sizes if size != "auto")


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def estimate_states(
    model: PreTrainedModel,
    sharding: StateSharding,
    optimizer: str,
    frozen: torch.dtype,
    trained: torch.dtype,
    compute: torch.dtype | None = None,
    *,
    quantized: bool = False,
) -> StateMemory:
    """Return the memory of a model's state.

    Args:
        model: Model with frozen and trainable parts set, on any device.
        sharding: Sharding over devices.
        optimizer: Value of ``--optim``.
        frozen: Data type of frozen weights.
        trained: Data type of trainable weights and their gradients.
        compute: Data type of products; None for that of the weights.
        quantized: Whether frozen layers are held in 4 bits (``--quantization_bit``).
    """
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    weights = counts[False] * frozen.itemsize + counts[True] * trained.itemsize
    weights -= int(_quantized_elements(model) * (frozen.itemsize - _NF4)) if quantized else 0
    gradients = counts[True] * (4 if sharding.sums_in_float32 else trained.itemsize)
    states = _optimizer_bytes(model, optimizer, 4 if sharding.masters else trained.itemsize) + (
        4 * counts[True] if sharding.masters else 0
    )
    of_optimizer = 0 if sharding.offloads_optimizer else states // (sharding.ranks if sharding.stage >= 1 else 1)
    return StateMemory(
        weights=0 if sharding.offloads_weights else weights // (sharding.ranks if sharding.stage == 3 else 1),
        gradients=gradients // (sharding.ranks if sharding.stage >= 2 else 1),
        optimizer=of_optimizer,
        checkpoint=states + (counts[True] * trained.itemsize if has_adapters(model) else weights),
        buffers=_buffers(model, sharding, counts[True] * trained.itemsize, (compute or trained).itemsize),
        step=_step_bytes(optimizer, sharding, counts[True]),
    )


def loading_bytes(states: StateMemory, sharding: StateSharding) -> int:
    """Return the bytes of host memory that each rank takes for a moment, before its weights are on its device.

    Without ZeRO-3, which shards weights as they are read, each rank loads the whole model.
    """
    if sharding.masters and sharding.stage == 3:
        return states.weights
    return states.weights * (sharding.ranks if sharding.stage == 3 else 1)


def _buffers(model: PreTrainedModel, sharding: StateSharding, trained: int, itemsize: int) -> int:
    """Return the bytes of copies of weights and of the engine's buffers.

    Args:
        model: Model, on any device.
        sharding: Sharding over devices.
        trained: Bytes of trainable weights.
        itemsize: Bytes of a number in products.
    """
    if sharding.masters:
        numel = sum(parameter.numel() for parameter in model.parameters())
        return min(sharding.bucket_bytes, 6 * numel)
    if sharding.stage == 3:  # FSDP2: embeddings and head stay gathered; two layers at a time, and one's sums in float32
        ends = {id(part): part for part in (model.get_input_embeddings().weight, output_head(model).weight)}
        layer = max(sum(value.numel() for value in one.parameters()) for one in decoder_layers(model))
        return sum(part.numel() for part in ends.values()) * itemsize + layer * (2 * itemsize + 4)
    return trained // 4 * itemsize if trained and itemsize == 2 else 0  # autocast's cache, of float32 weights


def _step_bytes(optimizer: str, sharding: StateSharding, trained: int) -> int:
    """Return the temporary bytes of an optimizer's step: foreach keeps the square roots of all second moments."""
    if optimizer != "adamw_torch" or sharding.offloads_optimizer:
        return 0
    return 4 * trained // (sharding.ranks if sharding.stage >= 1 else 1)


def _quantized_elements(model: PreTrainedModel) -> int:
    """Return the number of weights that bitsandbytes holds in 4 bits; see :mod:`qwenvl.models.quantization`."""
    layout = layout_of(model)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
        if not name.startswith((f"{layout.vision}.", layout.head))
    )


def _optimizer_bytes(model: nn.Module, optimizer: str, itemsize: int) -> int:
    """Return the bytes of an optimizer's state; Adam keeps two numbers of the weights' own type, of ``itemsize``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "adafactor":  # a row and a column of each matrix
        return sum(4 * (sum(value.shape[-2:]) if value.dim() > 1 else value.numel()) for value in trained)
    return int(sum(value.numel() for value in trained) * _STATES.get(optimizer, 2 * itemsize))
