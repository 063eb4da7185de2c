"""Sharded models, where accelerate and transformers leave something out: FSDP2 on CPUs, and weights that are tied."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn


def shard_on_cpu(accelerator: Accelerator, options: dict[str, Any]) -> None:
    """Have an accelerator of CPU ranks shard the model.

    accelerate looks at the plugin on devices of other kinds only: with ``--fsdp`` on CPUs it would train with DDP, and
    not say so. What it would set there is set here.

    Args:
        accelerator: of ranks on CPUs, before it has prepared anything.
        options: of the plugin: ``TrainingArguments.fsdp_plugin_args``.
    """
    plugin = FullyShardedDataParallelPlugin(**options)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP


def tie_gathered(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Let gathered weights share their memory where the model's do.

    accelerate gathers (FSDP2) or clones (ZeRO-1 and -2) every name by itself: a head that is tied to the embeddings
    becomes a copy of them, which ``save_pretrained`` would write as a weight of its own.

    Args:
        model: sharded or not.
        state_dict: whole tensors by name, changed in place.
    """
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for first, *others in names.values():
        for name in others:
            if name in state_dict:
                state_dict[name] = state_dict[first]
