"""Merging in float32, rounded once; and mistakes that stand out from float32 but not from bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.models.merging import TOLERANCE, logits_of, merge, sample_inputs
from qwenvl.utilities.errors import UserError
from tools.make_tiny_checkpoint import build_tiny_checkpoint


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build_tiny_checkpoint("qwen3_vl", folder, size="demo")
    return folder


def adapted(path: Path, *, use_dora: bool = False, size: float = 0.01) -> Any:
    """Return a model in bfloat16 with adapters that are not zero."""
    model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*_proj", use_dora=use_dora)
    found = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size, generator=generator)
    return found


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_in_bfloat16_moves_nothing_in_float32_and_rounds_once(four_layers: Path, use_dora: bool) -> None:
    model = adapted(four_layers, use_dora=use_dora)
    layer = model.get_base_model().model.language_model.layers[1].mlp.up_proj
    exact = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    if use_dora:
        exact *= (layer.lora_magnitude_vector["default"].weight / exact.norm(dim=1))[:, None]
    merged, report = merge(model, AutoProcessor.from_pretrained(four_layers))
    weight = merged.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, exact.bfloat16()) or (use_dora and (weight != exact.bfloat16()).float().mean() < 1e-3)
    assert report.error < TOLERANCE / 10 and report.effect > 0.01
    assert TOLERANCE < report.rounding < report.effect
    assert report.changed == 4 * 7 and not report.unchanged


def _scaled(layer: Any) -> None:
    """Let an adapter count by five hundredths more than merging knows of."""
    layer.lora_B["default"].register_forward_hook(lambda module, inputs, output: output * 1.05)


def _left_out(layer: Any) -> None:
    layer.lora_B["default"].register_forward_hook(lambda module, inputs, output: output * 0)


def _transposed(layer: Any) -> None:
    layer.fan_in_fan_out = True  # merging transposes the product, and forward does not


def _biased(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.full((layer.out_features,), 1e-3))


@pytest.mark.parametrize("mistake", [_scaled, _left_out, _transposed, _biased])
def test_a_mistake_in_one_layer_is_found(four_layers: Path, mistake: Callable[[Any], None]) -> None:
    """One projection of 28; in bfloat16, rounding moves the logits by 0.01 of their norm, and these by less."""
    model = adapted(four_layers, size=0.003)
    layer = model.get_base_model().model.language_model.layers[1].self_attn.q_proj
    mistake(layer)
    with pytest.raises(UserError, match=r"Merged weights give other logits than the adapters: in float32 they differ"):
        merge(model, AutoProcessor.from_pretrained(four_layers))


def test_adapters_smaller_than_the_last_digit_are_told_of(four_layers: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, report = merge(adapted(four_layers, size=1e-5), AutoProcessor.from_pretrained(four_layers))
    assert 2 * report.rounding > report.effect
    assert "little is left of what they have learned. --dtype float32 keeps it" in caplog.text


def test_logits_with_adapters_merged_on_the_way_leave_the_model_as_it_was(four_layers: Path) -> None:
    model = adapted(four_layers)
    inputs = sample_inputs(AutoProcessor.from_pretrained(four_layers), torch.device("cpu"))
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    first, merged, again = (logits_of(model, inputs, merged=merged) for merged in (False, True, False))
    assert torch.equal(first, again) and not torch.equal(first, merged)
    torch.testing.assert_close(first, merged, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
