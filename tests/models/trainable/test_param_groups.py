"""Parameter groups: each learning rate alone, weight decay as the Hugging Face Trainer's, nothing twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer

from qwenvl.models.trainable.freezing import parameter_modules, set_model
from qwenvl.models.trainable.param_groups import (
    has_weight_decay,
    learning_rates_of,
    module_learning_rates,
    parameter_groups,
)

RATES = {"learning_rate": 1e-5, "weight_decay": 0.1}


def rates(model, **options):
    return learning_rates_of(parameter_groups(model, **RATES, **options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"vision": 1e-5, "merger": 1e-5, "language": 1e-5}),
        ({"mm_projector_lr": 3e-5}, {"vision": 1e-5, "merger": 3e-5, "language": 1e-5}),
        ({"vision_tower_lr": 2e-6}, {"vision": 2e-6, "merger": 1e-5, "language": 1e-5}),
        ({"mm_projector_lr": 3e-5, "vision_tower_lr": 2e-6}, {"vision": 2e-6, "merger": 3e-5, "language": 1e-5}),
        ({"vision_tower_lr": 0.0}, {"vision": 0.0, "merger": 1e-5, "language": 1e-5}),
        ({"mm_projector_lr": 0.0}, {"vision": 1e-5, "merger": 0.0, "language": 1e-5}),
    ],
)
def test_each_learning_rate_works_alone(family_name, options, expected, load_tiny):
    assert rates(load_tiny(family_name), **options) == expected


def test_the_module_of_a_task_has_a_rate_of_its_own():
    given = {"learning_rate": 1e-5, "mm_projector_lr": None, "vision_tower_lr": None}
    assert [module_learning_rates(**given, head_lr=rate)["head"] for rate in (None, 0.0, 2e-3)] == [1e-5, 0.0, 2e-3]


def test_every_trainable_parameter_is_in_the_group_of_its_module_once(family_name, load_tiny):
    model = load_tiny(family_name)
    set_model(model, tune_mm_vision=False, tune_mm_mlp=True, tune_mm_llm=True)
    groups = parameter_groups(model, **RATES)
    assert {group["name"].split("/")[0] for group in groups} == {"merger", "language"}
    owner = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    assert len(owner) == sum(len(group["params"]) for group in groups)
    modules = parameter_modules(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert owner[id(parameter)].startswith(f"{modules[name]}/")
        else:
            assert id(parameter) not in owner
    torch.optim.AdamW(groups)


def test_weight_decay_is_the_trainers_without_its_slips(family_name, load_tiny):
    """The Trainer goes by names: it knows neither ``A_log`` nor Qwen2.5-VL's norms, which are called otherwise."""
    model = load_tiny(family_name)
    parameters = dict(model.named_parameters())
    theirs = parameters.keys() & set(Trainer.get_decay_parameter_names(None, model))
    ours = {name for name, parameter in parameters.items() if has_weight_decay(parameter)}
    slips = ("A_log", "norm1.weight", "norm2.weight", "ln_q.weight")
    assert ours == {name for name in theirs if not name.endswith(slips)}
    embeddings = {"model.language_model.embed_tokens.weight", "model.visual.pos_embed.weight"}
    assert ours >= embeddings & dict(model.named_parameters()).keys()
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(model, **RATES)}
    assert all(value == (0.1 if name.endswith("/decay") else 0.0) for name, value in decays.items())


def test_partitioned_parameters_decay_by_their_whole_shape():
    for shape, decays in ((torch.Size([4, 4]), True), (torch.Size([4]), False)):
        parameter = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves on every rank
        parameter.ds_shape = shape
        assert has_weight_decay(parameter) == decays
