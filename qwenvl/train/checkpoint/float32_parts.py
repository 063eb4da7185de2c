"""Save in float32 what a half-precision checkpoint stores so, where DeepSpeed computes with all parameters in one type.

Qwen3.5 stores ``A_log`` and the norms of linear attention in float32, and other engines keep them so in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwenvl.train.checkpoint.folder_check import Header

_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


def collect(model: nn.Module, source: Mapping[str, Header]) -> dict[str, Tensor]:
    """Return, in float32 on the host, the parameters that only DeepSpeed holds in half precision.

    Trained ones have the values of the optimizer's master weights, frozen ones those of the checkpoint's files. Every
    rank must call it.

    Args:
        model: Model in training under DeepSpeed.
        source: Tensors of the starting checkpoint; none are returned for one that is in float32 as a whole.
    """
    if not any(header.dtype in _HALF for header in source.values()):
        return {}
    return {
        name: _master(parameter) if parameter.requires_grad else _stored(name, source[name])
        for name, parameter in model.named_parameters()
        if name in source and source[name].dtype == "F32" and parameter.dtype in _HALF.values()
    }


def _master(parameter: nn.Parameter) -> Tensor:
    """Return the float32 copy of a parameter that DeepSpeed's optimizer updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    value: Any = safe_get_full_fp32_param(parameter)
    assert value is not None, "DeepSpeed has a master weight of every trained parameter"
    copy: Tensor = value.detach().to("cpu", torch.float32, copy=True)
    return copy.view(getattr(parameter, "ds_shape", parameter.shape))


def _stored(name: str, header: Header) -> Tensor:
    with safe_open(header.file, "pt") as tensors:
        value: Tensor = tensors.get_tensor(name)
    return value
