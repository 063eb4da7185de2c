"""The auxiliary loss of the experts, against transformers' own of each sample."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from qwenvl.models.loss.causal_lm import Balance
from qwenvl.models.loss.moe_aux_loss import sample_of_tokens, summed_balance
from qwenvl.models.trainable.freezing import configure_checkpointing
from qwenvl.tasks.objective import causal_loss
from tests.patches import install

FAMILIES = ["qwen3_vl_moe", "qwen3_5_moe"]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 4), st.integers(1, 3), st.integers(1, 3))
def test_equals_the_stock_loss_of_each_sample_times_its_tokens(lengths, padding, layers, top_k):
    torch.manual_seed(sum(lengths))
    samples = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, padding]))
    logits = [torch.randn(len(samples), 6, requires_grad=True) for _ in range(layers)]
    expected = sum(
        load_balancing_loss_func(tuple(layer[samples == number] for layer in logits), 6, top_k) * length
        for number, length in enumerate(lengths)
    )
    found = summed_balance(logits, top_k, samples, len(lengths))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found.dtype == torch.float32
    for one, other in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_number_is_read_from_the_device():
    """A device without memory has none."""
    batch = {"input_ids": torch.zeros(2, 3, device="meta"), "attention_mask": torch.ones(2, 3, device="meta")}
    for numbers, count in (
        sample_of_tokens(batch),
        sample_of_tokens({**batch, "cu_seq_lens_q": torch.zeros(4, dtype=torch.int32, device="meta")}),
    ):
        assert numbers.is_meta
        assert summed_balance([torch.zeros(len(numbers), 6, device="meta")], 2, numbers, count).is_meta


def stock_auxiliary(model: Any, sample: Any) -> Tensor:
    return model(**sample.inputs, output_router_logits=True).aux_loss


@pytest.mark.parametrize("layout", ["padded", "flattened"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_batch_adds_the_samples_weighed_by_tokens(family, layout, load_tiny, mixture, make_batch):
    if family == "qwen3_5_moe" and layout == "flattened":
        pytest.skip("linear attention needs its kernels to keep packed samples apart")
    samples = list(mixture(family).values())
    model = load_tiny(family)
    tokens = [sample.labels.shape[1] for sample in samples]
    with torch.no_grad():
        stock = sum(stock_auxiliary(model, sample) * count for sample, count in zip(samples, tokens, strict=True))
        install(model)
        batch = make_batch(layout, samples)
        plain = causal_loss(model, batch, num_trained_tokens=1.0)
        balance = Balance(100.0, model.config.get_text_config().num_experts_per_tok, sum(tokens))
        both = causal_loss(model, batch, num_trained_tokens=1.0, balance=balance)
        filler = causal_loss(model, batch | {"num_samples": 0}, num_trained_tokens=1.0, balance=balance)
    assert (both - plain).item() == pytest.approx(100 * stock.item() / sum(tokens), rel=1e-4)
    assert filler.item() == plain.item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_get_its_gradient_with_and_without_checkpointing(checkpointing, load_tiny, mixture, make_batch):
    model = load_tiny("qwen3_vl_moe")
    install(model)
    configure_checkpointing(model, "both" if checkpointing else None)
    batch = make_batch("padded", list(mixture("qwen3_vl_moe").values()))
    routers = [value for name, value in model.named_parameters() if name.endswith("mlp.gate.weight")]
    found = []
    for balance in (None, Balance(1.0, model.config.text_config.num_experts_per_tok, 1.0)):
        model.zero_grad()
        causal_loss(model, batch, num_trained_tokens=1e6, balance=balance).backward()
        found.append([router.grad.clone() for router in routers])
    assert routers
    for plain, balanced in zip(*found, strict=True):
        assert balanced.norm() > 10 * plain.norm()


def test_checkpointing_changes_nothing_of_its_gradient(load_tiny, mixture, make_batch):
    batch = make_batch("flattened", list(mixture("qwen3_vl_moe").values()))
    found = []
    for checkpointing in (False, True):
        model = load_tiny("qwen3_vl_moe")
        install(model)
        configure_checkpointing(model, "both" if checkpointing else None)
        causal_loss(model, batch, num_trained_tokens=1e6, balance=Balance(1.0, 2, 1.0)).backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_run_in_grouped_products(family, load_tiny, mixture, make_batch):
    model = load_tiny(family)
    install(model)
    with Operations() as operations:
        causal_loss(model, make_batch("padded", [mixture(family)["text"]]), num_trained_tokens=1.0)
    assert "_grouped_mm" in operations.names
