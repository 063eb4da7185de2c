"""The loss and every gradient against stock transformers, one sample at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.loss.causal_lm import GradientWatch, count_tokens, prepare_inputs, run_model, total_weight
from qwenvl.models.trainable.freezing import parameter_modules
from qwenvl.tasks.objective import causal_loss
from tests.models.conftest import BATCHES
from tests.patches import install

TOLERANCE = 1e-5


def without_labels(sample: Any) -> Any:
    return replace(sample, labels=torch.full_like(sample.labels, -100))


def stock_loss(model: PreTrainedModel, samples: list[Any]) -> Tensor:
    """The stock losses of the samples one by one, weighted by their trained tokens."""
    total = sum(sample.trained_tokens for sample in samples)
    losses = [model(**sample.inputs, labels=sample.labels).loss * sample.trained_tokens for sample in samples]
    return torch.stack(losses).sum() / total


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def gradient_errors(model: PreTrainedModel, expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest gradient difference of each module group, relative to the group's largest gradient."""
    groups, found = parameter_modules(model), gradients(model)
    assert found.keys() == expected.keys()
    worst = dict.fromkeys(groups.values(), 0.0)
    scale = dict.fromkeys(groups.values(), 0.0)
    for name, gradient in expected.items():
        worst[groups[name]] = max(worst[groups[name]], float((found[name] - gradient).abs().max()))
        scale[groups[name]] = max(scale[groups[name]], float(gradient.abs().max()))
    assert all(value > 0 for value in scale.values()), scale
    return {group: worst[group] / scale[group] for group in worst}


def in_precision(samples: list[Any], dtype: torch.dtype) -> list[Any]:
    """The samples with float inputs of a type."""
    return [
        replace(
            sample,
            inputs={
                key: value.to(dtype) if value.is_floating_point() else value for key, value in sample.inputs.items()
            },
        )
        for sample in samples
    ]


# In float32 the gradients of Qwen3.5's tower double its rounding many times over; in float64 it equals like the others.
PRECISIONS = {torch.float32: TOLERANCE, torch.float64: 1e-6}
COARSE = {("qwen3_5", torch.float32): 1e-4, ("qwen3_5_moe", torch.float32): 1e-4}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "segments"])
def test_equals_stock_one_by_one(family_name, layout, attention, dtype, load_tiny, mixture, make_batch):
    samples = in_precision(list(mixture(family_name).values()), dtype)
    model = load_tiny(family_name, "sdpa" if attention == "segments" else attention).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped products have no float64
    expected = stock_loss(model, samples)
    expected.backward()
    stock = gradients(model)
    model.zero_grad()
    install(model)
    if attention == "segments":
        attend_by_segments(model)
    total = sum(sample.trained_tokens for sample in samples)
    loss = causal_loss(model, make_batch(layout, samples), num_trained_tokens=total)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=PRECISIONS[dtype])
    errors = gradient_errors(model, stock)
    assert max(errors.values()) < COARSE.get((family_name, dtype), PRECISIONS[dtype]), errors


def weighted_stock_loss(model: PreTrainedModel, samples: list[Any], weights: list[Tensor]) -> Tensor:
    """The weighted mean of the stock model's cross entropy of each trained token, one sample at a time."""
    total, divisor = torch.zeros(()), 0.0
    for sample, weight in zip(samples, weights, strict=True):
        logits = model(**sample.inputs).logits[0, :-1]
        losses = functional.cross_entropy(logits, sample.labels[0, 1:], reduction="none")  # 0 for untrained ones
        total = total + (losses * weight[0, 1:]).sum()
        divisor += float(weight[0, 1:][sample.labels[0, 1:] != -100].sum())
    return total / divisor


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_weights_equal_a_weighted_mean_of_stock_losses(family_name, layout, dtype, load_tiny, mixture, make_batch):
    samples = in_precision(list(mixture(family_name).values()), dtype)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(sample.labels.shape, generator=generator) * 3 for sample in samples]
    weights = [one.where(sample.labels != -100, 0.0) for one, sample in zip(weights, samples, strict=True)]
    model = load_tiny(family_name, "sdpa").to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    expected = weighted_stock_loss(model, samples, weights)
    expected.backward()
    stock = gradients(model)
    model.zero_grad()
    install(model)
    rows = pad_sequence([one[0] for one in weights], True) if layout == "padded" else torch.cat(weights, dim=1)
    batch = BATCHES[layout](samples) | {"loss_weights": rows}
    divisor = total_weight(batch)
    loss = causal_loss(model, prepare_inputs(batch), num_trained_tokens=divisor)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=PRECISIONS[dtype])
    errors = gradient_errors(model, stock)
    assert max(errors.values()) < COARSE.get((family_name, dtype), PRECISIONS[dtype]), errors


def run(model: PreTrainedModel, batch: dict[str, Any], num_trained_tokens: float = 1.0) -> Tensor:
    """Loss and gradients of one batch, with fresh hooks."""
    handle = install(model)
    loss = causal_loss(model, batch, num_trained_tokens=num_trained_tokens)
    loss.backward()
    handle.remove()
    return loss.detach()


@pytest.mark.parametrize("content", ["text", "image", "video", "video, image"])
def test_each_modality_alone_equals_stock(family_name, layout, content, load_tiny, mixture, make_batch):
    sample = mixture(family_name)[content]
    model = load_tiny(family_name)
    expected = stock_loss(model, [sample])
    loss = run(model, make_batch(layout, [sample, sample]), 2 * sample.trained_tokens)
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_cache_would_leak_between_flattened_samples(family, load_tiny, mixture, make_batch):
    """Why the loss always asks for no cache: with one, stock transformers mixes the samples without a word."""
    samples = list(mixture(family).values())
    batch = make_batch("flattened", samples)
    model = load_tiny(family)
    right = run(model, batch, 1.0)

    class WithCache(torch.nn.Module):
        def forward(self, **kwargs: Any) -> Any:
            return model(**(kwargs | {"use_cache": True}))

    install(model)
    leaked = causal_loss(WithCache(), batch, num_trained_tokens=1.0)
    assert abs(leaked.item() - right.item()) > 1e-4 * abs(right.item())


def test_flattened_samples_do_not_see_each_other(family_name, layout, load_tiny, mixture, make_batch):
    """Another first sample of the same length leaves the second one's gradient of its own embeddings as it was."""
    if layout != "flattened":
        pytest.skip("one row only")
    first, second = mixture(family_name)["text"], mixture(family_name)["image"]
    batch = make_batch("flattened", [without_labels(first), second])
    model = load_tiny(family_name)
    loss = run(model, batch)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][:, : first.labels.shape[1]] = 7
    assert run(model, batch).item() == loss.item()


def test_vocabulary_projection_runs_on_trained_tokens_only(family_name, layout, load_tiny, mixture, make_batch):
    samples = list(mixture(family_name).values())
    model = load_tiny(family_name)
    install(model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    causal_loss(model, make_batch(layout, samples), num_trained_tokens=1.0)
    assert rows == [sum(sample.trained_tokens for sample in samples)]


def test_text_alone_gives_the_tower_gradients_of_exactly_zero(family_name, layout, load_tiny, mixture, make_batch):
    model = load_tiny(family_name)
    text = mixture(family_name)["text"]
    run(model, make_batch(layout, [text, text]))
    for name, parameter in model.model.visual.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert model.model.language_model.embed_tokens.weight.grad.any()


def test_a_batch_without_a_trained_token_gives_zero_everywhere(family_name, layout, load_tiny, mixture, make_batch):
    batch = make_batch(layout, [without_labels(mixture(family_name)[name]) for name in ("image", "text")])
    model = load_tiny(family_name)
    assert run(model, batch, 12.0).item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_trained_positions_are_those_before_trained_tokens():
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, 5, -100, -100, 6]])
    prepared = prepare_inputs({"labels": labels})
    assert prepared["kept_positions"].tolist() == [1, 2, 5, 8]
    assert prepared["targets"].tolist() == [7, 8, 5, 6]
    assert prepared["segments"].lengths == (5,)


def test_the_last_token_of_a_flattened_sample_predicts_nothing():
    labels = torch.tensor([[-100, 4, 5, -100, 6, 7]])  # two samples of three tokens
    prepared = prepare_inputs({"labels": labels, "cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)})
    assert prepared["kept_positions"].tolist() == [0, 1, 3, 4]
    assert prepared["targets"].tolist() == [4, 5, 6, 7]
    assert prepared["segments"].lengths == (3, 3)
    assert all(type(length) is int for length in prepared["segments"].lengths), "a tensor would be read from the device"


def test_weights_travel_as_bits():
    """DeepSpeed and FSDP2 round the numbers that a model is given to the type that it computes in."""
    labels = torch.tensor([[-100, 4, 5, -100, 6, 7]])
    weights = torch.rand(1, 6).where(labels != -100, 0.0)
    assert "target_weights" not in prepare_inputs({"labels": labels})
    batch = {"labels": labels, "loss_weights": weights}
    bits = prepare_inputs(batch)["target_weights"]
    assert bits.dtype == torch.int32
    assert torch.equal(bits.view(torch.float32), weights[0, [1, 2, 4, 5]])
    assert total_weight(batch) == pytest.approx(float(weights[0, [1, 2, 4, 5]].sum()))


def test_router_logits_are_returned_on_request(load_tiny, mixture, make_batch):
    model = load_tiny("qwen3_vl_moe")
    install(model)
    batch = make_batch("padded", [mixture("qwen3_vl_moe")["text"]])
    assert run_model(model, batch).router_logits is None
    layers = model.config.text_config.num_hidden_layers
    assert len(run_model(model, batch | {"output_router_logits": True}).router_logits) == layers


def test_tokens_of_a_batch_are_counted_without_padding_and_without_filler():
    """A batch that only fills the last step of an epoch holds a sample, which does not count."""
    padded = {"input_ids": torch.zeros(2, 5), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    for batch, tokens in ((padded, 7), ({"input_ids": torch.zeros(1, 9)}, 9)):
        assert count_tokens({**batch, "num_samples": 2}) == tokens
        assert count_tokens({**batch, "num_samples": 0}) == 0


def test_loss_is_float32_and_close_under_autocast(family_name, layout, load_tiny, mixture, make_batch):
    samples = list(mixture(family_name).values())
    total = sum(sample.trained_tokens for sample in samples)
    model = load_tiny(family_name)
    batch = make_batch(layout, samples)
    exact = run(model, batch, total)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(model, batch, total)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_bfloat16_weights_take_float32_patches(family_name, layout, load_tiny, mixture, make_batch):
    model = load_tiny(family_name).to(torch.bfloat16)
    loss = run(model, make_batch(layout, list(mixture(family_name).values())))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_evaluation_gives_the_training_loss_without_a_graph(family_name, layout, load_tiny, mixture, make_batch):
    batch = make_batch(layout, list(mixture(family_name).values()))
    model = load_tiny(family_name)
    trained = run(model, batch)
    model.eval()
    install(model)
    with torch.no_grad():
        evaluated = causal_loss(model, batch, num_trained_tokens=1.0)
    assert not evaluated.requires_grad
    assert evaluated.item() == pytest.approx(trained.item(), rel=TOLERANCE)


class TestGradientWatch:
    def test_reports_what_the_loss_does_not_reach(self, load_tiny, mixture, make_batch):
        model = load_tiny("qwen3_vl")
        model.unused = torch.nn.Linear(2, 2)
        model.model.visual.merger.linear_fc1.weight.requires_grad_(False)
        watch = GradientWatch(model)
        run(model, make_batch("padded", [mixture("qwen3_vl")["text"]]))
        model.zero_grad(set_to_none=True)  # as DeepSpeed does before anyone can look at .grad
        assert watch.missing() == ["unused.weight", "unused.bias"]

    def test_reports_everything_before_the_first_step_and_after_closing(self, load_tiny, mixture, make_batch):
        model = load_tiny("qwen3_vl")
        watch = GradientWatch(model)
        assert len(watch.missing()) == len(list(model.parameters()))
        watch.close()
        run(model, make_batch("padded", [mixture("qwen3_vl")["text"]]))
        model.zero_grad(set_to_none=True)
        assert len(watch.missing()) == len(list(model.parameters()))

    def test_works_through_ddp_and_gradient_checkpointing(self, tmp_path, load_tiny, mixture, make_batch):
        model = load_tiny("qwen3_vl")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            install(model)
            watch = GradientWatch(model)
            batch = make_batch("padded", list(mixture("qwen3_vl").values()))
            causal_loss(DistributedDataParallel(model), batch, num_trained_tokens=1.0).backward()
            model.zero_grad(set_to_none=True)
            assert watch.missing() == []
        finally:
            torch.distributed.destroy_process_group()
