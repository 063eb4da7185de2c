"""Parameters that ZeRO-3 or FSDP have shared out over the ranks, looked at as a whole."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


def full_size(parameter: nn.Parameter) -> int:
    """Number of elements of the whole parameter.

    ZeRO-3 leaves an empty tensor and the size in ``ds_numel``; bitsandbytes packs two weights of 4 bits into a byte.
    """
    quantized: Any = getattr(parameter, "quant_state", None)
    if quantized is not None:
        return math.prod(quantized.shape)
    size: int = getattr(parameter, "ds_numel", None) or parameter.numel()
    return size


def is_shared_out(parameter: Tensor) -> bool:
    """Whether ranks hold parts of the parameter, so that all of them have to take part where it is gathered."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def gathered(parameter: nn.Parameter) -> Tensor:
    """Return a copy of the whole parameter on the host; every rank has to call it."""
    if hasattr(parameter, "full_tensor"):  # FSDP2
        copy: Tensor = parameter.full_tensor().detach().cpu()
        return copy
    with whole(parameter):
        return parameter.detach().to("cpu", copy=True).contiguous()


def whole(parameter: Tensor, *, changed: bool = False) -> AbstractContextManager[Any]:
    """Hold a parameter that ZeRO-3 has shared out together for a while; every rank has to call it.

    Args:
        parameter: shared out or not.
        changed: every rank changes it meanwhile in the same way, and the change is to stay.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    together: AbstractContextManager[Any] = zero.GatheredParameters([parameter], modifier_rank=0 if changed else None)
    return together
