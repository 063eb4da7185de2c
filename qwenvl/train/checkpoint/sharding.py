"""Sharded models in cases that accelerate and transformers do not cover: precision of FSDP2, CPUs, and tied weights."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


def fsdp_precision(*, bf16: bool, fp16: bool) -> MixedPrecisionPolicy:
    """Return FSDP2's precision: products in 16 bits, sums over ranks and the loss in float32.

    accelerate would reduce gradients in 16 bits, and round the loss, which is the model's output here, to them: three
    digits of a loss, whose factor then scales every gradient.

    Args:
        bf16: Whether to compute in bfloat16.
        fp16: Whether to compute in float16.
    """
    if not (bf16 or fp16):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else torch.float16, reduce_dtype=torch.float32)


def shard_on_cpu(accelerator: Accelerator, options: dict[str, Any]) -> None:
    """Make an accelerator of CPU ranks shard the model.

    accelerate ignores the plugin on CPUs: with ``--fsdp`` it would silently train with DDP. This function makes the
    settings that accelerate makes on other devices.

    Args:
        accelerator: Accelerator of CPU ranks, before it has prepared anything.
        options: Options of the plugin, from ``TrainingArguments.fsdp_plugin_args``.
    """
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP


def tie_gathered(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Make gathered weights share memory if they are tied in the model.

    accelerate gathers (FSDP2) or clones (ZeRO-1 and -2) every name separately: a head that is tied to the embeddings
    becomes a copy, which ``save_pretrained`` would write as a weight of its own.

    Args:
        model: Model, sharded or not.
        state_dict: Whole tensors by name, changed in place.
    """
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for first, *others in names.values():
        for name in others:
            if name in state_dict:
                state_dict[name] = state_dict[first]
