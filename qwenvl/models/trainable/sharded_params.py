"""Whole parameters, where ZeRO-3 or FSDP has sharded them across ranks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


def full_size(parameter: nn.Parameter) -> int:
    """Return the number of elements of the whole parameter.

    ZeRO-3 leaves an empty tensor and the size in ``ds_numel``; bitsandbytes packs two weights of 4 bits into a byte.
    """
    quantized: Any = getattr(parameter, "quant_state", None)
    if quantized is not None:
        return math.prod(quantized.shape)
    size: int = getattr(parameter, "ds_numel", None) or parameter.numel()
    return size


def is_sharded(parameter: Tensor) -> bool:
    """Whether each rank holds only a part of the parameter. Gathering it is a collective: every rank must take part."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def full_tensor_cpu(parameter: nn.Parameter) -> Tensor:
    """Return a copy of the whole parameter on the host; every rank must call it."""
    if hasattr(parameter, "full_tensor"):  # FSDP2
        copy: Tensor = parameter.full_tensor().detach().cpu()
        return copy
    with gather_params(parameter):
        return parameter.detach().to("cpu", copy=True).contiguous()


def gather_params(parameter: Tensor, *, changed: bool = False) -> AbstractContextManager[Any]:
    """Gather a parameter that ZeRO-3 has sharded, while the context is open; every rank must call it.

    Args:
        parameter: Parameter, sharded or not.
        changed: Whether to keep what is written to the parameter meanwhile; every rank must write the same.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    context: AbstractContextManager[Any] = zero.GatheredParameters([parameter], modifier_rank=0 if changed else None)
    return context
