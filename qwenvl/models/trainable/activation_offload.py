"""Keep the tensors that a backward pass needs in host memory (``--activation_offload``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl.models.trainable.sharded_params import is_sharded

SMALL = 1 << 20
"""Bytes of a tensor that is not worth its copy."""


@contextmanager
def kept_on_host(model: nn.Module, head: nn.Module, *, pin_memory: bool) -> Iterator[None]:
    """Move saved tensors to the host while the context is open, and back when the backward pass needs them.

    ``torch.autograd.graph.save_on_cpu`` also moves weights, which stay on the device anyway, and what the head saves:
    its gradients, which are as large as the vocabulary's weights and are needed first.

    Args:
        model: Model, sharded or not.
        head: Its projection to the vocabulary.
        pin_memory: Whether copies are in pinned memory, for a CUDA device, so that nothing waits for them.
    """
    weights = {_storage(one) for one in model.parameters() if not is_sharded(one)}
    in_head = [False]

    def keep(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if in_head[0] or tensor.nbytes < SMALL or _storage(tensor) in weights:
            return tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=pin_memory)
        return tensor.device, copy.copy_(tensor, non_blocking=pin_memory)

    def give_back(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device, copy = kept
        return copy.to(device, non_blocking=pin_memory)

    def enters(*_: Any) -> None:
        in_head[0] = True

    def leaves(*_: Any) -> None:
        in_head[0] = False

    handles = head.register_forward_pre_hook(enters), head.register_forward_hook(leaves)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; a view has that of its base."""
    return tensor.untyped_storage().data_ptr()
