"""The vocabulary projection in chunks against the whole of it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qwenvl.models.loss.fused_lm_head import LossHead, linear_cross_entropy


def make(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(columns, 16, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, columns, (rows,), generator=generator)


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(2, 50), st.integers(1, 400), st.integers(0, 1000), st.floats(-3, 3))
def test_chunks_of_any_size_give_the_loss_and_gradients_of_the_whole(rows, columns, chunk, seed, factor):
    hidden, weight, targets = make(rows, columns, seed)
    whole = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, targets, chunk_elements=chunk)
    for found, expected in zip(
        gradients(ours * factor, hidden, weight), gradients(whole * factor, hidden, weight), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(2, 50), st.integers(1, 400), st.integers(0, 1000), st.floats(-3, 3))
def test_factors_of_rows_weigh_loss_and_gradients(rows, columns, chunk, seed, factor):
    hidden, weight, targets = make(rows, columns, seed)
    factors = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 3
    whole = (functional.cross_entropy(hidden @ weight.T, targets, reduction="none") * factors.double()).sum()
    ours = linear_cross_entropy(hidden, weight, targets, factors, chunk_elements=chunk)
    for found, expected in zip(
        gradients(ours * factor, hidden, weight), gradients(whole * factor, hidden, weight), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, targets = make(9, 20, 0)
    whole = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(whole, [weight if frozen == "hidden" else hidden])[0]
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, targets, chunk_elements=50)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    assert [hidden.grad is not None, weight.grad is not None] == [frozen == "weight", frozen == "hidden"]
    for tensor in (hidden, weight):
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected)


def test_no_rows_give_zero_and_gradients_of_zero():
    hidden, weight, _ = make(1, 20, 0)
    loss, grad_hidden, grad_weight = gradients(
        linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.int64)), hidden, weight
    )
    assert loss == 0 and not grad_hidden.any() and not grad_weight.any()


class Largest(TorchDispatchMode):
    """Notes the largest number of elements that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_of_all_logits_exists():
    hidden, weight, targets = make(500, 300, 0)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, chunk_elements=8900).backward()
    assert 500 * 16 < largest.elements <= 8900


def test_autocast_computes_as_a_linear_layer_does_and_keeps_float32_gradients():
    hidden, weight, targets = make(64, 300, 0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
        ours = linear_cross_entropy(hidden, weight, targets, chunk_elements=6000)
    found, expected = gradients(ours, hidden, weight), gradients(whole, hidden, weight)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 1e-2 * other.norm()


def test_the_head_returns_logits_where_no_targets_are_set_and_uses_targets_once():
    linear = nn.Linear(16, 40, bias=False)
    head = LossHead(linear)
    hidden = torch.randn(1, 6, 16)
    assert torch.equal(head(hidden), linear(hidden))
    head.targets = torch.arange(6)
    assert head(hidden).shape == ()
    assert torch.equal(head(hidden), linear(hidden))
    factors = torch.tensor([0.3, 2.0, 1.0, 0.7, 1.0, 5.0])
    head.targets, head.target_weights = torch.arange(6), factors.view(torch.int32)
    expected = functional.cross_entropy(linear(hidden[0]), torch.arange(6), reduction="none") @ factors
    torch.testing.assert_close(head(hidden), expected)
    head.targets = torch.arange(6)  # without weights of their own
    plain = functional.cross_entropy(linear(hidden[0]), torch.arange(6), reduction="sum")
    torch.testing.assert_close(head(hidden), plain)
    assert head.state_dict().keys() == linear.state_dict().keys() and head.weight is linear.weight


def test_rows_of_their_own_take_the_place_of_those_of_the_weight():
    torch.manual_seed(0)
    linear = nn.Linear(16, 40, bias=False).requires_grad_(False)
    head, rows = LossHead(linear), nn.Parameter(torch.randn(2, 16))
    hidden, targets = torch.randn(1, 6, 16), torch.tensor([7, 3, 1, 1, 7, 30])
    head.train_rows([7, 3], rows)
    changed = linear.weight.clone()
    changed[7], changed[3] = rows[0], rows[1]
    assert torch.equal(head(hidden), functional.linear(hidden, changed))
    head.targets = targets
    loss = head(hidden)
    expected = functional.cross_entropy(functional.linear(hidden[0], changed), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (ours,), (stock,) = torch.autograd.grad(loss, [rows]), torch.autograd.grad(expected, [rows])
    torch.testing.assert_close(ours, stock)


def test_what_is_passed_is_returned_once_whatever_else_is_set():
    head = LossHead(nn.Linear(16, 40, bias=False))
    found = torch.tensor(2.5)
    head.passed, head.targets = found, torch.zeros(1, dtype=torch.int64)
    assert head(torch.randn(1, 6, 16)) is found
    assert head(torch.randn(1, 6, 16)).shape == (1, 6, 40)


def test_a_projection_with_a_bias_is_not_taken_for_one_without():
    with pytest.raises(AssertionError, match="bias"):
        LossHead(nn.Linear(16, 40))
