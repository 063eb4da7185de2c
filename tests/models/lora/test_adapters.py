"""Adapters: which layers get one, what it adds, and what trains beside it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from qwenvl.models.lora.adapters import (
    AdapterSettings,
    adapter_sizes,
    add_adapters,
    count_adapted_layers,
    has_adapters,
    is_adapter,
    name_pattern,
    targeted_layers,
    trained_in_float32,
    trains_whole,
)
from qwenvl.models.trainable.freezing import set_model
from qwenvl.utils.errors import UserError

QUERY = "model.language_model.layers.0.self_attn.q_proj"


def frozen(model):
    set_model(model, tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=False, adapted=True)
    return model


def settings(target=None, **changes):
    target = re.escape(QUERY) if target is None else target
    return AdapterSettings(**{"target": target, "r": 4, "alpha": 8, "dropout": 0.0, **changes})


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 2.0), ({"alpha": 1}, 0.25), ({"r": 2}, 4.0), ({"use_rslora": True}, 4.0)],
    ids=str,
)
def test_an_adapter_counts_alpha_over_its_rank(changes, scale, load_tiny):
    model = frozen(load_tiny("qwen3_vl"))
    assert add_adapters(model, settings(**changes)) == [QUERY]
    layer = model.get_submodule(QUERY)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert len(down) == changes.get("r", 4) and not up.any()
    nn.init.normal_(up)
    inputs = torch.randn(3, down.shape[1])
    added = layer(inputs) - layer.get_base_layer()(inputs)
    torch.testing.assert_close(added, scale * inputs @ down.T @ up.T, rtol=1e-4, atol=1e-5)


def test_dropout_and_dora_reach_the_layer(load_tiny):
    model = frozen(load_tiny("qwen3_vl"))
    add_adapters(model, settings(dropout=0.25, use_dora=True))
    layer = model.get_submodule(QUERY)
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.use_dora["default"] and len(layer.lora_magnitude_vector["default"].weight) == layer.out_features


PARTS = {
    "language": r"model\.language_model\.layers\.\d+\.",
    "vision": r"model\.visual\.blocks\.\d+\.",
    "merger": r"model\.visual\.(merger|deepstack_merger_list)\.",
}


@pytest.mark.parametrize("target", ["language", "vision", "merger", "vision,merger", "all"])
def test_groups_are_the_linear_layers_of_their_modules(target, family_name, load_tiny):
    model = frozen(load_tiny(family_name))
    parts = list(PARTS) if target == "all" else target.split(",")
    pattern = re.compile("|".join(PARTS[part] for part in parts))
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.match(name) and module.out_features > 1
    ]
    assert expected and targeted_layers(model, target) == expected


def test_a_gate_with_one_output_gets_no_adapter(load_tiny):
    model = frozen(load_tiny("qwen3_5_moe"))
    gates = [name for name, module in model.named_modules() if name.endswith("shared_expert_gate")]
    assert gates and all(model.get_submodule(name).out_features == 1 for name in gates)
    assert not set(gates) & set(targeted_layers(model, "language"))
    with pytest.raises(UserError, match="matches no linear layer"):
        targeted_layers(model, r".*shared_expert_gate")


def test_what_is_named_and_cannot_have_an_adapter_is_refused(load_tiny):
    model = frozen(load_tiny("qwen3_vl_moe"))
    with pytest.raises(UserError, match="matches no linear layer"):
        targeted_layers(model, r".*mlp\.gate")  # a router
    with pytest.raises(UserError, match="matches no linear layer") as caught:
        targeted_layers(model, r".*(lm_head|embed_tokens|norm)")
    shown = re.findall(r"model\.[\w.]+\w", str(caught.value))
    assert len(shown) == 3 and all(isinstance(model.get_submodule(name), nn.Linear) for name in shown)
    whole = targeted_layers(model, r".*layers\.1\.self_attn\.[qk]_proj|.*layers\.1\.self_attn|.*\.lm_head")
    assert whole == [f"model.language_model.layers.1.self_attn.{name}_proj" for name in "qk"]
    with pytest.raises(UserError, match="matches no linear layer"):
        targeted_layers(model, r"self_attn.*q_proj")  # the whole name has to match


@pytest.mark.parametrize(
    ("switch", "target"), [("tune_mm_llm", "language"), ("tune_mm_mlp", "merger"), ("tune_mm_vision", "vision")]
)
def test_a_part_does_not_train_whole_and_by_adapters(switch, target, load_tiny):
    switches = dict.fromkeys(("tune_mm_vision", "tune_mm_mlp", "tune_mm_llm"), False)
    model = load_tiny("qwen3_vl")
    set_model(model, **switches | {switch: True})
    for both in (target, "all"):
        with pytest.raises(UserError, match=f"--{switch} True"):
            add_adapters(model, settings(both))
    assert not has_adapters(model)
    other = "vision" if target != "vision" else "merger"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert add_adapters(model, settings(other)) == targeted_layers(load_tiny("qwen3_vl"), other)
    assert has_adapters(model)
    after = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in after if not is_adapter(name)} == trained, "what trained before trains on, and no more"
    assert sum(map(is_adapter, after)) == 2 * count_adapted_layers(model)


def test_names_tell_adapters_from_the_checkpoints_own():
    assert is_adapter(f"{QUERY}.lora_A.default.weight") and not is_adapter(f"{QUERY}.base_layer.weight")
    assert trains_whole("model.visual.merger.linear_fc1.weight")
    assert not any(map(trains_whole, [f"{QUERY}.lora_B.default.weight", "lm_head.rows", "task_head.head.weight"]))


def test_sizes_count_the_matrices_of_each_part(load_tiny):
    model = frozen(load_tiny("qwen3_vl"))
    add_adapters(model, settings("language,merger", r=2, use_dora=True))
    expected = {"language": 0, "merger": 0}
    plain = load_tiny("qwen3_vl")
    for part in expected:
        layers = [plain.get_submodule(name) for name in targeted_layers(plain, part)]
        expected[part] = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    assert adapter_sizes(model) == expected
    assert count_adapted_layers(model) == sum(len(targeted_layers(plain, part)) for part in expected)


def test_what_trains_is_kept_in_float32(load_tiny):
    model = frozen(load_tiny("qwen3_vl").bfloat16())
    add_adapters(model, settings())
    model.model.visual.merger.requires_grad_(True)
    trained_in_float32(model)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_a_pattern_stands_for_a_list_where_it_means_the_same():
    names = [f"layers.{layer}.{kind}_proj" for layer in range(3) for kind in "kqv"] + ["layers.0"]
    queries = [name for name in names if name.endswith("q_proj")]
    assert name_pattern(queries, names) == r"layers\.\d+\.q_proj"
    assert name_pattern([*queries, "layers.0.k_proj"], names) == [*queries, "layers.0.k_proj"]
    both = [name for name in names if name[-6] in "qk"]
    assert name_pattern(both, names) == r"layers\.\d+\.k_proj|layers\.\d+\.q_proj"
    assert name_pattern(["layers.0"], names) == r"layers\.\d+"
