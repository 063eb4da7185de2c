"""Merging in float32, rounded once; and mistakes that stand out from float32 but not from bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.models import adapter_merging
from qwenvl.models.adapter_merging import (
    TOLERANCE,
    MergeReport,
    distance,
    logits_of,
    merge,
    open_adapted,
    sample_inputs,
)
from qwenvl.utils.errors import UserError

SOUND = MergeReport(changed=3, unchanged=(), effect=0.5, error=1e-6, rounding=1e-3)


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
    """One projection of 28, of adapters so small that no logits in bfloat16 would show them."""
    model = adapted(four_layers, size=0.003)
    name = "model.language_model.layers.1.self_attn.q_proj"
    mistake(model.get_base_model().get_submodule(name))
    with pytest.raises(UserError, match=rf"^{name} computes something else when its adapter is merged: in float32"):
        merge(model, AutoProcessor.from_pretrained(four_layers))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_a_mistake_in_one_expert_is_found(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """PEFT wraps a module of stacked experts twice, once for each projection."""
    base = tiny_checkpoint(family)
    weights = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def opened() -> Any:
        model = AutoModelForImageTextToText.from_pretrained(base)
        found = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=weights)).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
        return found

    processor = AutoProcessor.from_pretrained(base)
    merged, report = merge(opened(), processor)
    layers = merged.config.text_config.num_hidden_layers
    assert report.changed == 2 * layers and not report.unchanged and report.error < TOLERANCE
    for projection, wrapper in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        model = opened()
        name = f"model.language_model.layers.1.mlp.experts{wrapper}"
        layer = model.get_base_model().get_submodule(name)
        assert layer.parameter_name == projection
        product, factors = layer.get_delta_weight, torch.ones(layer.num_experts, 1, 1)
        factors[2] = 1.001
        layer.get_delta_weight = lambda *given, product=product, factors=factors: product(*given) * factors
        with pytest.raises(UserError, match=rf"^{name} computes something else when its adapter is merged"):
            merge(model, processor)


def test_adapters_smaller_than_the_last_digit_are_told_of(four_layers: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, report = merge(adapted(four_layers, size=1e-5), AutoProcessor.from_pretrained(four_layers))
    assert 2 * report.rounding > report.effect
    assert "rounding hides much of the training. --dtype float32 merges without rounding" in caplog.text


def test_logits_with_adapters_merged_on_the_way_leave_the_model_as_it_was(four_layers: Path) -> None:
    model = adapted(four_layers)
    inputs = sample_inputs(AutoProcessor.from_pretrained(four_layers), torch.device("cpu"))
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    first, merged, again = (logits_of(model, inputs, merged=merged) for merged in (False, True, False))
    assert torch.equal(first, again) and not torch.equal(first, merged)
    torch.testing.assert_close(first, merged, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def folders(tiny_checkpoint, tmp_path) -> tuple[Path, Path]:
    """A checkpoint, and a folder of adapters on its queries, written by PEFT."""
    base = tiny_checkpoint("qwen3_vl")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*q_proj"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("error", [math.nan, math.inf, 1.1e-4])
def test_logits_that_moved_by_more_than_rounding_are_refused(error):
    with pytest.raises(UserError, match=r"Merged weights give other logits.*Nothing was saved"):
        adapter_merging._require_sound(replace(SOUND, error=error))


def test_what_rounding_explains_is_sound(caplog):
    adapter_merging._require_sound(SOUND)
    adapter_merging._require_sound(replace(SOUND, error=TOLERANCE))
    adapter_merging._require_sound(replace(SOUND, rounding=SOUND.effect / 2))
    assert not caplog.records


def test_rounding_that_hides_the_adapters_is_said(caplog):
    adapter_merging._require_sound(replace(SOUND, rounding=0.26))
    assert "change the logits by 0.5 of their norm, and rounding the merged weights by 0.26" in caplog.text


def test_weights_that_did_not_change_are_named_and_refused_if_none_did(caplog):
    names = tuple(f"layers.{number}" for number in range(8))
    with pytest.raises(UserError, match="None of the 8 adapted weights changed"):
        adapter_merging._require_sound(replace(SOUND, changed=0, unchanged=names))
    adapter_merging._require_sound(replace(SOUND, changed=1, unchanged=names))
    assert "8 adapted weights did not change: layers.0, " in caplog.text
    assert "layers.5" in caplog.text and "layers.6" not in caplog.text


def test_merged_logits_are_those_of_the_adapters(folders):
    base, folder = folders
    processor = AutoProcessor.from_pretrained(base)
    inputs = sample_inputs(processor, torch.device("cpu"))
    plain = logits_of(AutoModelForImageTextToText.from_pretrained(base).eval(), inputs)
    peft = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder).eval()
    expected = logits_of(peft, inputs)
    opened = open_adapted(str(base), str(folder), torch.float32)
    assert not opened.training
    model, report = merge(opened, processor)
    layers = model.config.text_config.num_hidden_layers
    assert (report.changed, report.unchanged) == (layers, ())
    assert report.effect == pytest.approx(distance(plain, expected), rel=1e-4) and report.effect > 0.01
    assert report.error < 1e-5 and report.rounding < 1e-5, "nothing is rounded in float32"
    torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-4, atol=1e-4)
    # PEFT 0.18 leaves its config on the model, newer ones do not; the parts have to be stock ones in either.
    stock = AutoModelForImageTextToText.from_pretrained(base)
    assert [(name, type(part)) for name, part in model.named_modules()] == [
        (name, type(part)) for name, part in stock.named_modules()
    ]


def test_one_adapter_of_zeros_is_named(folders, caplog):
    base, folder = folders
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in tensors if ".layers.0." in name and "lora_B" in name)
    save_file(tensors | {first: torch.zeros_like(tensors[first])}, folder / "adapter_model.safetensors")
    model, report = merge(open_adapted(str(base), str(folder), torch.float32), AutoProcessor.from_pretrained(base))
    assert report.unchanged == ("model.language_model.layers.0.self_attn.q_proj.weight",)
    assert report.changed == model.config.text_config.num_hidden_layers - 1
    assert report.unchanged[0] in caplog.text


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_a_folder_is_refused(missing, folders):
    base, folder = folders
    (folder / missing).unlink()
    with pytest.raises(UserError, match=r"holds no adapter_config\.json with adapter_model\.safetensors"):
        open_adapted(str(base), str(folder), torch.float32)


def test_a_tensor_that_finds_no_place_is_refused(folders):
    base, folder = folders
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.blocks.9.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"1 fit nothing \(base_model.model.model.blocks.9"):
        open_adapted(str(base), str(folder), torch.float32)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_names_of_older_transformers_are_read(family, tiny_checkpoint, tmp_path):
    """``visual.`` and ``model.layers.`` at the top, as before 4.52: the same adapters, merged to the same weights."""
    base = tiny_checkpoint(family)
    torch.manual_seed(0)
    targets = r".*language_model.*q_proj|.*visual.*qkv"
    wrapped = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=4, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path)
    merged = []
    for rename in (False, True):
        if rename:
            file = tmp_path / "adapter_model.safetensors"
            older = {
                name.replace(".model.model.visual.", ".model.visual.").replace(
                    "language_model.layers", "layers"
                ): tensor
                for name, tensor in load_file(file).items()
            }
            assert not any("language_model" in name or ".model.model.visual" in name for name in older)
            save_file(older, file, metadata={"format": "pt"})
        opened = open_adapted(str(base), str(tmp_path), torch.float32)
        merged.append(merge(opened, AutoProcessor.from_pretrained(base))[0].state_dict())
    plain = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, merged[1][name])}
    assert any("visual" in name for name in changed) and any("language_model" in name for name in changed)


def test_weights_have_the_type_that_is_asked_for(folders):
    base, folder = folders
    opened = open_adapted(str(base), str(folder), torch.bfloat16)
    assert opened.get_base_model().dtype == torch.bfloat16


def test_the_distance_is_relative_to_the_second():
    assert distance(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == pytest.approx(5 / 4)


def test_the_sample_holds_a_picture_and_a_question(folders):
    inputs = sample_inputs(AutoProcessor.from_pretrained(folders[0]), torch.device("cpu"))
    assert len(inputs["image_grid_thw"]) == len(inputs["input_ids"]) == 1
    assert inputs["pixel_values"].std() > 0
