"""Measure the memory of a training step without allocating it, by running the step on the meta device.

Tensors on the meta device have shapes and types but no content, so that the step of any model runs anywhere in seconds.
All allocations and frees of the step are counted in their real order, including temporary tensors and recomputation.
The attention is replaced by one that keeps the same tensors as flash attention, since kernels are chosen on a GPU only.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, PreTrainedModel

from qwenvl.models.attention.probe import show
from qwenvl.models.parts import output_head
from qwenvl.tasks.objective import Objective, batch_loss

NAME = "attention_shapes"
"""Name in transformers' registry of an attention that allocates its tensors but does not compute."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Peak memory of one micro-batch, in bytes, without weights, gradients and optimizer.

    Args:
        activations: Bytes of the model without its vocabulary projection, temporary tensors included.
        logits: Bytes that the vocabulary projection and its loss add; 0 if the peak is elsewhere.
    """

    activations: int
    logits: int


class _LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count the storages of its results."""
        if func is torch.ops.aten._grouped_mm.default:
            result: Any = _grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage(), counted=True)
        return result

    def add(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        """Register a storage; storages that exist before the step are registered, but not counted."""
        key, size = id(storage), storage.nbytes() if counted else 0
        if key in self._known:
            return

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _grouped_product(rows: Tensor, matrices: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Allocate the grouped matrix product of experts, which torch may support for 16 bits only on the meta device.

    Args:
        rows: [S, K], sorted by expert; in the product for the matrices' gradient, [K, S].
        matrices: [experts, K, N]; in the product for their gradient, [S, N].
        offs: [experts], end of each expert's rows.

    Returns:
        [S, N]; in the product for the matrices' gradient, [experts, K, N].
    """
    by_expert = offs.shape if matrices.dim() == 2 else ()
    return rows.new_empty(*by_expert, rows.shape[0], matrices.shape[-1])


class _FlashShapes(torch.autograd.Function):
    """Attention that keeps the same tensors as flash attention: inputs, output, and one float32 per row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    show(module, query, key, kwargs)
    return _FlashShapes.apply(query, key, value).transpose(1, 2).contiguous(), None


def measure_step(model: PreTrainedModel, batch: Mapping[str, Any], objective: Objective | None = None) -> StepMemory:
    """Run forward and backward pass of one micro-batch on the meta device.

    Args:
        model: Model on the meta device, ready for training (:func:`qwenvl.models.forward.install`); its attention is
            replaced, and it is left in training mode, without which layers are not checkpointed.
        batch: Batch prepared by the objective.
        objective: Objective of the training; None for language modelling.
    """
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    model.train()
    moved = tree_map(lambda value: value.to("meta") if torch.is_tensor(value) else value, dict(batch))
    moved.pop("attention_mask", None)  # stock linear attention reads its values, which do not exist here
    memory = _LiveMemory()
    for value in (*model.parameters(), *model.buffers(), *filter(torch.is_tensor, tree_leaves(moved))):
        memory.add(value.untyped_storage(), counted=False)
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients are counted elsewhere
            parameter.grad = torch.empty_like(parameter)
            memory.add(parameter.grad.untyped_storage(), counted=False)
    with _peak_within(output_head(model), memory) as of_head, memory:
        batch_loss(objective or Objective(), model, moved, units=1.0)[0].backward()
    model.zero_grad()
    logits = max(0, memory.peak - max(of_head)) if of_head[1] == memory.peak else 0
    return StepMemory(memory.peak - logits, logits)


@contextmanager
def _peak_within(head: nn.Module, memory: _LiveMemory) -> Iterator[list[int]]:
    """Yield a list of two values: live memory when the head starts, and the peak when it ends."""
    found = [0, 0]

    def before(*_: object) -> None:
        found[0] = memory.live

    def after(*_: object) -> None:
        found[1] = memory.peak

    handles = head.register_forward_pre_hook(before), head.register_forward_hook(after)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
