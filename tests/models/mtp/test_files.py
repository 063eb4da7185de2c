"""Experts one by one or stacked, and layers that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwenvl.models.mtp import files
from qwenvl.models.mtp.layer import MultiTokenPrediction
from qwenvl.utils.errors import UserError


def stacked() -> dict[str, Tensor]:
    numbers = torch.arange(12 * 2 * 6 * 4.0)  # twelve experts, so that the order of numbers is not that of texts
    experts = "mtp.layers.0.mlp.experts"
    return {
        "mtp.fc.weight": torch.ones(4, 8),
        f"{experts}.gate_up_proj": numbers.view(12, 12, 4),
        f"{experts}.down_proj": numbers[: 12 * 24].view(12, 4, 6),
    }


def test_experts_are_split_as_published_and_stacked_again() -> None:
    tensors = stacked()
    single = files.split_experts(tensors)
    assert files.stores_single_experts(single) and not files.stores_single_experts(tensors)
    assert len(single) == 1 + 3 * 12
    joined, last = (tensors[f"mtp.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    for number in (0, 2, 11):
        prefix = f"mtp.layers.0.mlp.experts.{number}"
        assert torch.equal(single[f"{prefix}.gate_proj.weight"], joined[number, :6])
        assert torch.equal(single[f"{prefix}.up_proj.weight"], joined[number, 6:])
        assert torch.equal(single[f"{prefix}.down_proj.weight"], last[number])
    again = files.stack_experts(dict(reversed(single.items())))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_experts_of_the_model_are_left_alone() -> None:
    tensors = {"model.language_model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 4, 3)}
    assert files.split_experts(tensors) == tensors
    assert files.stack_experts({"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2)}).keys() != {}


@pytest.fixture
def layer(load_tiny: Callable[[str], Any]) -> MultiTokenPrediction:
    return MultiTokenPrediction(load_tiny("qwen3_5").model.language_model)


def test_a_layer_of_other_names_or_shapes_is_refused(layer: MultiTokenPrediction, tmp_path: Path) -> None:
    own = {f"mtp.{name}": value.detach().clone() for name, value in layer.named_parameters()}
    wrong = {
        "mtp.norm.weight": own | {"mtp.norm.weight": torch.zeros(3)},
        "mtp.layers.1.input_layernorm.weight": own | {"mtp.layers.1.input_layernorm.weight": torch.zeros(64)},
        "mtp.fc.weight": {name: value for name, value in own.items() if name != "mtp.fc.weight"},
    }
    for name, tensors in wrong.items():
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=rf"not those of one layer.*{name}"):
            files.load(layer, [tmp_path / "model.safetensors"], "here")
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"here holds no mtp\.\* tensors"):
        files.load(layer, [tmp_path / "model.safetensors"], "here")
    save_file({name: value + 1 for name, value in own.items()}, tmp_path / "model.safetensors")
    files.load(layer, [tmp_path / "model.safetensors"], "here")
    assert all(torch.equal(value, own[f"mtp.{name}"] + 1) for name, value in layer.named_parameters())
