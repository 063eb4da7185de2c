"""The loss and every gradient against stock transformers, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from qwenvl.models.freezing import parameter_modules
from qwenvl.models.loss import GradientWatch, causal_loss, trained_positions
from qwenvl.models.vision import install_vision_call

TOLERANCE = 1e-5


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_stock_one_by_one(family_name, layout, attention, load_tiny, mixture, make_batch):
    samples = list(mixture(family_name).values())
    model = load_tiny(family_name, attention)
    expected = stock_loss(model, samples)
    expected.backward()
    stock = gradients(model)
    model.zero_grad()
    install_vision_call(model)
    total = sum(sample.trained_tokens for sample in samples)
    loss = causal_loss(model, make_batch(layout, samples), num_trained_tokens=total)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    errors = gradient_errors(model, stock)
    assert max(errors.values()) < TOLERANCE, errors
