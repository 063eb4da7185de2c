"""How much memory a training step takes, counted without having it: the step runs on the meta device.

Tensors on the meta device have shapes and types and no content, so that the step of any model runs anywhere in seconds.
What is counted is what the step allocates and frees, temporary tensors and recomputation included, in the order in
which the real step does. The attention is replaced by one that holds what flash attention holds; there is no GPU here
to choose the kernel.
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
"""Under which transformers knows the attention that allocates and does not compute."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Most memory of one micro-batch, in bytes, besides weights, gradients and optimizer.

    Args:
        activations: of the whole model but for its vocabulary projection, temporary tensors included.
        logits: what the vocabulary projection and its loss add at the peak, if that is where it is.
    """

    activations: int
    logits: int


class _LiveMemory(TorchDispatchMode):
    """Counts the bytes of storages that operators make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it made."""
        if func is torch.ops.aten._grouped_mm.default:
            result: Any = _grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage(), counted=True)
        return result

    def add(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        """Take note of a storage; one that is there before the step is known, but not counted."""
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
    """Allocate the grouped matrix product of experts; on the meta device, torch may have it for 16 bits alone.

    Args:
        rows: [S, K], sorted by expert; of the gradient of the matrices [K, S].
        matrices: [experts, K, N]; of their gradient [S, N].
        offs: [experts].

    Returns:
        [S, N]; of the gradient of the matrices [experts, K, N].
    """
    by_expert = offs.shape if matrices.dim() == 2 else ()
    return rows.new_empty(*by_expert, rows.shape[0], matrices.shape[-1])


class _FlashShapes(torch.autograd.Function):
    """Attention that keeps what flash attention keeps: inputs, output, and a float32 a row and head."""

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
        model: on the meta device, ready for training (:func:`qwenvl.models.forward.install`); its attention is changed.
        batch: prepared by the objective.
        objective: what is learned; None for language modelling.
    """
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    moved = tree_map(lambda value: value.to("meta") if torch.is_tensor(value) else value, dict(batch))
    moved.pop("attention_mask", None)  # stock linear attention asks whether it holds any padding; shapes do not tell
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
    """Give a list that will hold the live memory when the head is entered, and the peak when it is left."""
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
