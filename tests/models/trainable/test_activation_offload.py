"""Which of the tensors that a backward pass needs go to the host, and what comes back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwenvl.models.trainable.activation_offload import SMALL, kept_on_host

WIDTH = 1024


class Watched(torch.autograd.Function):
    """Saves its input and notes the addresses of what it saved and what comes back."""

    @staticmethod
    def forward(ctx, value: Tensor, seen: list[tuple[int, int]]) -> Tensor:
        ctx.save_for_backward(value)
        ctx.seen, ctx.saved = seen, value.data_ptr()
        return value * 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        ctx.seen.append((ctx.saved, value.data_ptr()))
        return grad * value, None


class Head(nn.Module):
    """Saves a large tensor of its own."""

    def __init__(self, seen: list[tuple[int, int]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, value: Tensor) -> Tensor:
        return Watched.apply(value, self.seen).sum()


def test_inputs_of_layers_are_copied_and_weights_small_tensors_and_the_head_are_not() -> None:
    inputs, weights, small, of_head = [], [], [], []
    layer, head = nn.Linear(WIDTH, WIDTH), Head(of_head)
    model = nn.Sequential(layer, head)
    four = torch.ones(4, requires_grad=True)
    value = torch.randn(SMALL // WIDTH, WIDTH, requires_grad=True)
    assert value.nbytes > SMALL and layer.weight.nbytes > SMALL

    def loss() -> Tensor:
        scale = Watched.apply(four, small).sum()
        hidden = Watched.apply(value, inputs) @ Watched.apply(layer.weight.T, weights)
        return head(hidden) * scale

    expected = torch.autograd.grad(loss(), [value, layer.weight, four])
    for seen in (inputs, weights, small, of_head):
        seen.clear()
    with kept_on_host(model, head, pin_memory=False):
        total = loss()
    found = torch.autograd.grad(total, [value, layer.weight, four])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for seen, copied in ((inputs, True), (weights, False), (small, False), (of_head, False)):
        ((saved, returned),) = seen
        assert (saved != returned) is copied
    assert not head._forward_hooks and not head._forward_pre_hooks
