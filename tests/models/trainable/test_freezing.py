"""The freeze switches against the contract, for every family and every combination."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.models.loss.causal_lm import GradientWatch
from qwenvl.models.task_module import Readout, attach
from qwenvl.models.trainable.freezing import (
    checkpointed_parts,
    configure_checkpointing,
    freeze_unused,
    full_size,
    parameter_modules,
    refuse_unused,
    set_model,
    summarize,
)
from qwenvl.tasks.objective import causal_loss
from qwenvl.utils.errors import UserError
from tests.patches import install

SWITCHES = ("tune_mm_vision", "tune_mm_mlp", "tune_mm_llm")
COMBINATIONS = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product((True, False), repeat=3)]
TRAINING = [
    pytest.param(switches, id="+".join(name for name in SWITCHES if switches[name])) for switches in COMBINATIONS[:-1]
]


def switch_of(name: str) -> str:
    """The contract, spelled a second time by the names of the stock modules."""
    if not name.startswith("model.visual."):
        return "tune_mm_llm"
    part = name.split(".")[2]
    return "tune_mm_mlp" if part in ("merger", "deepstack_merger_list") else "tune_mm_vision"


@pytest.mark.parametrize("switches", TRAINING)
def test_switches_follow_the_contract(family_name, switches, load_tiny):
    model = load_tiny(family_name)
    rows = {row.module: row for row in set_model(model, **switches)}
    totals = dict.fromkeys(SWITCHES, 0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == switches[switch_of(name)], name
        totals[switch_of(name)] += parameter.numel()
    for module, switch in (("vision", SWITCHES[0]), ("merger", SWITCHES[1]), ("language", SWITCHES[2])):
        assert rows[module].total == totals[switch] > 0
        assert rows[module].trainable == totals[switch] * switches[switch]


def test_a_model_in_which_nothing_trains_is_an_error(family_name, load_tiny):
    with pytest.raises(UserError, match="No parameter trains"):
        set_model(load_tiny(family_name), **COMBINATIONS[-1])


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_projection_follows_the_language_model(tied, tiny_checkpoint):
    config = AutoConfig.from_pretrained(tiny_checkpoint("qwen3_vl"))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    with pytest.raises(UserError):
        set_model(model, tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=False)
    assert not model.lm_head.weight.requires_grad
    assert not model.model.language_model.embed_tokens.weight.requires_grad
    rows = set_model(model, tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=True)
    assert model.lm_head.weight.requires_grad
    assert sum(row.total for row in rows) == model.num_parameters()  # a tied tensor counts once


def test_a_frozen_untied_output_projection_does_not_move(load_tiny, mixture, make_batch):
    model = load_tiny("qwen2_5_vl")
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    set_model(model, tune_mm_vision=True, tune_mm_mlp=True, tune_mm_llm=False)
    before = model.lm_head.weight.detach().clone()
    step(model, make_batch("padded", [mixture("qwen2_5_vl")["image"]]))
    torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1.0).step()
    assert torch.equal(model.lm_head.weight, before)


def step(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of one batch."""
    handle = install(model)
    model.zero_grad(set_to_none=True)
    causal_loss(model, batch, num_trained_tokens=1.0).backward()
    handle.remove()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def count_runs(module: nn.Module) -> list[int]:
    """A list that grows at each run of the module, also when a checkpoint recomputes it.

    Recomputation ends as soon as nothing more is needed, so the module should be an early one, and its start counts.
    """
    runs: list[int] = []
    module.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("switches", TRAINING)
def test_checkpointing_changes_no_gradient_and_loses_none(family_name, switches, load_tiny, mixture, make_batch):
    samples = [mixture(family_name)[name] for name in ("text", "video, image")]
    batch = make_batch("padded", samples)
    model = load_tiny(family_name)
    set_model(model, **switches)
    plain = step(model, batch)
    configure_checkpointing(model, "both")
    language = count_runs(model.model.language_model.layers[0].input_layernorm)
    tower = count_runs(model.model.visual.blocks[0].norm1)
    watch = GradientWatch(model)
    checkpointed = step(model, batch)
    assert watch.missing() == []
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert plain.keys() == checkpointed.keys() == trainable
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert len(language) == 2  # forward, and recomputed in the backward pass
    assert len(tower) == (2 if switches["tune_mm_vision"] else 1)
    assert model.model.visual.blocks[0].gradient_checkpointing == switches["tune_mm_vision"]
    configure_checkpointing(model, None)
    language.clear()
    step(model, batch)
    assert len(language) == 1


@pytest.mark.parametrize(
    ("parts", "runs"), [("language", (2, 1)), ("vision", (1, 2)), ("both", (2, 2)), (None, (1, 1))]
)
def test_parts_are_checkpointed_one_by_one(parts, runs, load_tiny, mixture, make_batch):
    model = load_tiny("qwen3_vl")
    configure_checkpointing(model, "both")
    configure_checkpointing(model, parts)
    assert checkpointed_parts(model) == [name for name in ("language", "vision") if parts in (name, "both")]
    language = count_runs(model.model.language_model.layers[0].input_layernorm)
    tower = count_runs(model.model.visual.blocks[0].norm1)
    step(model, make_batch("padded", [mixture("qwen3_vl")["image"]]))
    assert (len(language), len(tower)) == runs


class Probe(Readout):
    """A module that reads what goes into the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.record = {}
        self.score = nn.Linear(4, 1)

    def unused(self, language_model: Any) -> list[nn.Module]:
        return [*language_model.layers[1:], language_model.norm]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])  # tied and untied
def test_the_module_of_a_task_trains_and_what_it_does_not_read_does_not(family, load_tiny):
    model = load_tiny(family)
    attach(model, Probe())
    frozen = dict.fromkeys(SWITCHES, False)
    (*others, head) = set_model(model, **frozen, adapted=True)
    assert (head.module, head.trainable, head.total) == ("head", 5, 5)
    assert not any(row.trainable for row in others)
    set_model(model, **frozen | {"tune_mm_llm": True})
    freeze_unused(model, model.task_head)
    language = {name for name in dict(model.named_parameters()) if not name.startswith(("model.visual", "task_head"))}
    still = {name for name in language if model.get_parameter(name).requires_grad}
    unread = ("model.language_model.norm", *(f"model.language_model.layers.{number}." for number in (1, 2, 3)))
    assert {name for name in language - still if not name.startswith(unread)} == language & {"lm_head.weight"}
    assert not any(name.startswith(unread) for name in still) and len(still) > 5
    assert set(parameter_modules(model).values()) == {"vision", "merger", "language", "head"}


def test_adapters_that_a_task_would_not_train_are_refused(load_tiny):
    model = load_tiny("qwen3_vl").requires_grad_(False)
    layers = model.model.language_model.layers
    layers[1].self_attn.q_proj.weight.requires_grad_(True)
    refuse_unused(model)  # without a task all layers are read
    attach(model, Probe())
    with pytest.raises(UserError, match="--lora_target names layers above --hidden_layer"):
        refuse_unused(model)
    layers[1].requires_grad_(False)
    layers[0].self_attn.q_proj.weight.requires_grad_(True)
    refuse_unused(model)


def test_learning_rates_are_shown_where_they_are_known(load_tiny):
    rows = summarize(load_tiny("qwen3_vl"), {"merger": 1e-4})
    assert [(row.module, row.learning_rate) for row in rows] == [("vision", None), ("merger", 1e-4), ("language", None)]


def test_what_checkpointing_keeps_can_be_kept_elsewhere(load_tiny, mixture, make_batch):
    """The inputs of checkpointed layers pass through the hooks by which ``--activation_offload`` moves them."""
    model = load_tiny("qwen3_vl")
    configure_checkpointing(model, "both")
    install(model)
    batch = make_batch("padded", [mixture("qwen3_vl")["text"]])
    kept: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_loss(model, batch, num_trained_tokens=1.0)
    inputs = [*batch["input_ids"].shape, model.config.text_config.hidden_size]
    assert kept.count(torch.Size(inputs)) >= model.config.text_config.num_hidden_layers


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("switches", TRAINING)
def test_a_frozen_tower_builds_no_graph(family_name, switches, checkpointing, load_tiny, mixture, make_batch):
    model = load_tiny(family_name)
    set_model(model, **switches)
    configure_checkpointing(model, "both" if checkpointing else None)
    graph: dict[str, bool] = {}
    visual = model.model.visual
    for name, module in (("patches", visual.patch_embed), ("block", visual.blocks[-1]), ("merger", visual.merger)):
        module.register_forward_hook(lambda *args, name=name: graph.update({name: args[2].requires_grad}))
    step(model, make_batch("padded", [mixture(family_name)["image"], mixture(family_name)["text"]]))
    vision, merger = switches["tune_mm_vision"], switches["tune_mm_mlp"]
    assert graph == {"patches": vision, "block": vision, "merger": vision or merger}


def test_every_parameter_has_one_group(family_name, load_tiny):
    model = load_tiny(family_name)
    assert parameter_modules(model).keys() == dict(model.named_parameters()).keys()


def test_sizes_of_partitioned_parameters_are_the_whole_ones():
    parameter = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves on every rank
    parameter.ds_numel = 12
    assert full_size(parameter) == 12
    assert full_size(nn.Parameter(torch.zeros(3, 5))) == 15


def test_a_frozen_tower_builds_no_graph_even_if_its_patches_require_a_gradient(load_tiny, mixture, make_batch):
    """Stock checkpointing makes embeddings of every part require one, the tower's patches too."""
    model = load_tiny("qwen2_5_vl")
    set_model(model, tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=True)
    model.model.visual.enable_input_require_grads()
    graph: list[bool] = []
    model.model.visual.blocks[-1].register_forward_hook(lambda *args: graph.append(args[2].requires_grad))
    step(model, make_batch("padded", [mixture("qwen2_5_vl")["image"]]))
    assert graph == [False]


def test_checkpointing_reaches_a_layer_whose_input_requires_no_gradient(load_tiny, mixture, make_batch):
    """As with adapters: the embeddings are frozen, so reentrant checkpointing would drop the first layer's gradient."""
    model = load_tiny("qwen3_vl").requires_grad_(False)
    configure_checkpointing(model, "both")
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    step(model, make_batch("padded", [mixture("qwen3_vl")["image"]]))
    assert weight.grad is not None and weight.grad.any()
