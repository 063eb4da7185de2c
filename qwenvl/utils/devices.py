"""Copies from the host to a device that do not wait for the work queued there."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host through pinned memory; an ordinary copy would wait for all earlier work.

    Args:
        tensor: Tensor on the host. One that is on the device already is returned as it is.
        device: Device of the result.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
