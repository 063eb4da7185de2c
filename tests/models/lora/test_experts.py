"""Adapters of stacked experts, against weights to which the products of the pairs were added, and against PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForImageTextToText, PreTrainedModel

from qwenvl.models.lora.adapters import (
    AdapterSettings,
    adapter_sizes,
    add_adapters,
    count_adapted_experts,
    targeted_experts,
    targeted_layers,
)
from qwenvl.models.lora.experts import (
    PROJECTIONS,
    count_experts,
    default_expert_rank,
    expert_modules,
    peft_name,
    target_parameters,
)
from qwenvl.models.lora.files import collect, describe_base, save
from qwenvl.models.trainable.freezing import set_model
from qwenvl.utils.errors import UserError

MIXTURES = ["qwen3_vl_moe", "qwen3_5_moe"]
LAYER = "model.language_model.layers.1.mlp.experts"


def settings(target: str = "experts", **changes: Any) -> AdapterSettings:
    return AdapterSettings(**{"target": target, "r": 6, "alpha": 8, "dropout": 0.0, **changes})


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    set_model(model, tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=False, adapted=True)
    return model


def adapted(model: PreTrainedModel, chosen: AdapterSettings) -> PreTrainedModel:
    """Add adapters and give all of them values."""
    add_adapters(frozen(model), chosen)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def with_products(model: PreTrainedModel, pairs: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the experts' weights plus the product of each expert's own pair, one expert after the other.

    Columns of B stand in the order (rank, expert), rows of A in the order (expert, rank), as in PEFT.
    """
    changed: dict[str, Tensor] = {}
    for name in expert_modules(model):
        for projection in PROJECTIONS:
            weight = model.get_parameter(f"{name}.{projection}")
            down, up = (pairs[f"{name}.lora_{half}_{projection}"] for half in "AB")
            experts, rank = len(weight), len(down) // len(weight)
            deltas = [up[:, e::experts] @ down[e * rank : (e + 1) * rank] for e in range(experts)]
            changed[f"{name}.{projection}"] = weight.detach() + scale * torch.stack(deltas)
    return changed


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 8 / 3), ({"expert_r": 2}, 4.0), ({"expert_r": 4, "use_rslora": True}, 4.0)],
    ids=["r / experts per token", "a rank", "rslora"],
)
def test_loss_and_gradients_are_those_of_weights_with_the_products_added(
    family: str, changes: dict[str, Any], scale: float, load_tiny: Any
) -> None:
    model = adapted(load_tiny(family), settings(**changes))
    tokens = torch.arange(5, 29).reshape(2, 12)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    pairs = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(pairs) == 4 * len(expert_modules(model))
    stock = frozen(load_tiny(family))
    stock.set_experts_implementation("eager")
    leaves = {name: value.detach().clone().requires_grad_() for name, value in pairs.items()}
    inputs = {"input_ids": tokens, "labels": tokens}
    expected = functional_call(stock, with_products(stock, leaves, scale), kwargs=inputs).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert abs(expected - stock(**inputs).loss) > 1e-3
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 0, name
        torch.testing.assert_close(pairs[name].grad, leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("target", ["language,experts", "experts"])
def test_peft_opens_them_and_computes_the_same(
    family: str, target: str, load_tiny: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    model = adapted(load_tiny(family), settings(target)).eval()
    describe_base(model, str(tiny_checkpoint(family)))
    save(model, tmp_path, collect(model))
    opened = PeftModel.from_pretrained(load_tiny(family), tmp_path).eval()
    tokens = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        expected, plain = model(input_ids=tokens).logits, load_tiny(family).eval()(input_ids=tokens).logits
        torch.testing.assert_close(opened(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
        directly = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(directly(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-2
    config = opened.peft_config["default"]
    assert sorted(config.target_parameters) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    if target == "experts":
        assert config.r == 3 and not config.rank_pattern
    else:
        assert config.r == 6 and set(config.rank_pattern.values()) == {3}


def test_only_some_layers_may_have_them(load_tiny: Any, tiny_checkpoint: Any, tmp_path: Path) -> None:
    model = adapted(load_tiny("qwen3_5_moe"), settings(re.escape(LAYER), r=3, expert_r=3)).eval()
    assert count_adapted_experts(model) == 1 < len(expert_modules(model))
    describe_base(model, str(tiny_checkpoint("qwen3_5_moe")))
    save(model, tmp_path, collect(model))
    opened = PeftModel.from_pretrained(load_tiny("qwen3_5_moe"), tmp_path).eval()
    tokens = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=tokens).logits, model(input_ids=tokens).logits)
    config = opened.peft_config["default"]
    assert sorted(config.target_parameters) == [f"{LAYER}.down_proj", f"{LAYER}.gate_up_proj"]
    assert not config.rank_pattern


def test_adapters_start_as_nothing_and_in_the_type_of_the_weights(load_tiny: Any) -> None:
    model, stock = frozen(load_tiny("qwen3_vl_moe").bfloat16()), load_tiny("qwen3_vl_moe").bfloat16()
    add_adapters(model, settings())
    module = model.get_submodule(LAYER)
    assert {module.lora_A_down_proj.dtype, module.lora_B_down_proj.dtype} == {torch.bfloat16}
    assert module.lora_A_gate_up_proj.abs().max() > 0 and not module.lora_B_gate_up_proj.any()
    bound = module.gate_up_proj.shape[2] ** -0.5  # PEFT's linear layers: kaiming_uniform_ with a = sqrt(5)
    assert 0.9 * bound < module.lora_A_gate_up_proj.abs().max() <= bound * 1.01
    tokens = torch.arange(5, 29)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, stock(input_ids=tokens).logits)


def test_products_are_not_rounded_into_weights_of_bfloat16(load_tiny: Any) -> None:
    """Products of 1/1024 beside weights of 1 and -1, whose sum would be these weights again."""
    model = frozen(load_tiny("qwen3_vl_moe").bfloat16())
    add_adapters(model, settings(expert_r=1, alpha=1))
    module = model.get_submodule(LAYER)
    experts, outputs, inputs = module.down_proj.shape
    module.gate_up_proj.data.fill_(0.5)
    module.down_proj.data = torch.tensor([1.0, -1.0]).bfloat16().repeat(experts, outputs, inputs // 2)
    module.lora_A_down_proj.data = torch.ones(experts, inputs)
    module.lora_B_down_proj.data = torch.full((outputs, experts), 2.0**-10)
    assert torch.equal(module.down_proj + 2.0**-10, module.down_proj)
    rows, chosen = torch.ones(experts, module.hidden_dim) / 8, torch.arange(experts)[:, None]
    inner = module._apply_gate(rows @ module.gate_up_proj[0].float().T)
    with torch.no_grad():
        outputs = module(rows, chosen, torch.ones(experts, 1))
    torch.testing.assert_close(outputs, inner.sum(1, keepdim=True).expand_as(outputs) * 2.0**-10, rtol=0.02, atol=0)


@pytest.mark.parametrize("changes", [{"dropout": 0.05}, {"use_dora": True}])
def test_what_peft_cannot_open_is_refused(changes: dict[str, Any], load_tiny: Any) -> None:
    flag = "--lora_dropout 0.05" if "dropout" in changes else "--use_dora True"
    for target in ("language,experts", "all", r".*mlp\.experts"):
        with pytest.raises(UserError, match=rf"^{re.escape(f'{flag} with --lora_target {target}')}: .*stacked experts"):
            add_adapters(frozen(load_tiny("qwen3_vl_moe")), settings(target, **changes))
    add_adapters(frozen(load_tiny("qwen3_vl_moe")), settings("language", **changes))
    add_adapters(frozen(load_tiny("qwen3_vl")), settings("language,experts", **changes))


def test_experts_are_chosen_by_word_or_by_name(load_tiny: Any) -> None:
    model = load_tiny("qwen3_5_moe")
    every = expert_modules(model)
    assert LAYER in every and len(every) == model.config.text_config.num_hidden_layers
    assert targeted_experts(model, "all") == targeted_experts(model, "vision,experts") == every
    assert targeted_experts(model, "language") == []
    assert not targeted_layers(model, "experts")
    assert targeted_experts(model, r".*\.mlp\.experts") == every and not targeted_layers(model, r".*\.mlp\.experts")
    dense = load_tiny("qwen3_vl")
    assert not expert_modules(dense) and not count_experts(dense)
    with pytest.raises(UserError, match=r"^--lora_target experts: qwen3_vl has no such layers"):
        add_adapters(frozen(dense), settings("experts"))


def test_a_token_passes_the_adapters_of_the_experts_that_it_is_sent_to(load_tiny: Any) -> None:
    model = frozen(load_tiny("qwen3_vl_moe"))
    add_adapters(model, settings(r=3))
    text, layers = model.config.text_config, len(expert_modules(model))
    assert text.num_experts_per_tok == 2 and default_expert_rank(model, 3) == 2, "rounded up"
    gate_and_up, down = text.hidden_size + 2 * text.moe_intermediate_size, text.hidden_size + text.moe_intermediate_size
    each = 2 * (gate_and_up + down)  # of rank 2
    assert adapter_sizes(model) == {"language": layers * text.num_experts * each}
    assert adapter_sizes(model, per_token=True) == {"language": layers * text.num_experts_per_tok * each}


def test_names_in_files_are_those_of_nested_wrappers() -> None:
    assert peft_name(f"{LAYER}.lora_A_gate_up_proj") == f"{LAYER}.base_layer.lora_A.weight"
    assert peft_name(f"{LAYER}.lora_B_gate_up_proj") == f"{LAYER}.base_layer.lora_B.weight"
    assert peft_name(f"{LAYER}.lora_B_down_proj") == f"{LAYER}.lora_B.weight"
    others = [f"{LAYER}.down_proj", "layers.0.mlp.down_proj.lora_A.default.weight", "lora_A_down_proj.weight"]
    assert [peft_name(name) for name in others] == others
    assert target_parameters(["a.0.mlp.experts", "a.1.mlp.experts"], ["a.0.mlp.experts", "a.1.mlp.experts"]) == [
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ]
    assert target_parameters(["a.0.mlp.experts"], ["a.0.mlp.experts", "a.1.mlp.experts"]) == [
        "a.0.mlp.experts.gate_up_proj",
        "a.0.mlp.experts.down_proj",
    ]


def test_experts_of_a_mixture_are_counted(load_tiny: Any) -> None:
    assert count_experts(load_tiny("qwen3_vl")) == 0
    assert count_experts(load_tiny("qwen3_5")) == 0, "convolutions of linear attention are no stacked experts"
    model = load_tiny("qwen3_vl_moe")
    text = model.config.text_config
    each = 3 * text.hidden_size * text.moe_intermediate_size
    layers = sum(name.endswith(".experts") for name, _ in model.named_modules())
    assert layers and count_experts(model) == layers * text.num_experts * each
