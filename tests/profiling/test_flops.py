"""The operations computed from a config are those that torch counts while the model runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from qwenvl.data.media.resize import ImagePlan
from qwenvl.data.sample_stats import MEASURES, measure_row
from qwenvl.data.types import ImageItem
from qwenvl.families import FAMILIES, get_family
from qwenvl.models.forward import install
from qwenvl.models.lora.adapters import AdapterSettings, adapter_sizes, add_adapters
from qwenvl.models.loss.causal_lm import prepare_inputs, run_model
from qwenvl.models.mtp.layer import MultiTokenPrediction
from qwenvl.models.trainable.freezing import set_model
from qwenvl.profiling.flops import Trained, training_flops
from qwenvl.tasks.objective import causal_loss
from tests.patches import patchify_of

GRIDS = ((1, 16, 24), (3, 16, 8), (1, 8, 8))  # whole windows of Qwen2.5-VL
TEXT, ANSWER = 180, 60  # with the pictures 448 tokens: whole chunks of linear attention
FROZEN = [
    Trained(vision=False),
    Trained(vision=False, merger=False),
    Trained(vision=False, language=False),
    Trained(merger=False, language=False),
]


@pytest.fixture(scope="module")
def build(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """Function of the family and changes to its text config that builds a model with real proportions, in small."""
    models: dict[str, PreTrainedModel] = {}

    def function(family: str, **changes: Any) -> PreTrainedModel:
        key = f"{family} {changes}"
        if key not in models:
            config = AutoConfig.from_pretrained(tiny_checkpoint(family))
            text = config.get_text_config()
            text.hidden_size, text.vocab_size = 256, 1024
            text.num_attention_heads, text.num_key_value_heads = 16, 8  # heads as wide as the tiny model's
            if hasattr(text, "intermediate_size"):
                text.intermediate_size = 640
            if hasattr(text, "moe_intermediate_size"):
                text.moe_intermediate_size = 160
            for name, value in changes.items():
                setattr(text, name, value)
            if hasattr(config.vision_config, "out_hidden_size"):
                config.vision_config.out_hidden_size = 256
            else:
                config.vision_config.hidden_size = 256
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
            model.set_experts_implementation("eager")
            install(model, patchify_of(tiny_checkpoint(family)), plain_loss)
            models[key] = model.train()
        return models[key]

    return function


def plain_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None, row_losses: Tensor | None
) -> Tensor:
    """The same products as in chunks, where torch counts them all: its counter passes over sums made in place."""
    del row_losses  # nobody reads them here
    assert factors is None
    return cross_entropy(linear(hidden, weight), targets, reduction="sum")


def one_batch(model: PreTrainedModel) -> tuple[dict[str, Any], np.ndarray]:
    """A sample with pictures and a video, as a batch and as its measures."""
    vision = model.config.vision_config
    visual = sum(math.prod(grid) for grid in GRIDS) // vision.spatial_merge_size**2
    length = visual + TEXT + ANSWER
    labels = torch.full((1, length), -100)
    labels[:, -ANSWER:] = 7
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, TEXT : TEXT + visual] = True
    media = [(2 * grid[0] - 1, *grid) for grid in GRIDS]  # one frame of each is shown twice
    values = sum(frames * height * width for frames, _, height, width in media) * 3 * vision.patch_size**2
    batch = {
        "input_ids": torch.full((1, length), 7).masked_fill(mask, model.config.image_token_id),
        "labels": labels,
        "position_ids": torch.arange(length).expand(4, 1, length),
        "vision_rows": mask.flatten().nonzero().squeeze(1),
        "num_samples": 1,
        "pixels": torch.zeros(values, dtype=torch.uint8),
        "media": media,
    }
    plans = [ImagePlan(ImageItem(""), (0, 0), grid, (0, 0)) for grid in GRIDS]
    return prepare_inputs(batch), np.array(measure_row(length, ANSWER, plans), MEASURES)


def count_products(counter: FlopCounterMode) -> int:
    """Return the operations without those of rotary tables, which older transformers make by a product."""
    tables = (ops for name, ops in counter.get_flop_counts().items() if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - sum(sum(ops.values()) for ops in tables)


@pytest.mark.parametrize(
    ("family", "trained"), [*((name, Trained()) for name in FAMILIES), *(("qwen3_vl", one) for one in FROZEN)], ids=str
)
def test_flops_are_what_torch_counts(family: str, trained: Trained, build: Callable[[str], PreTrainedModel]) -> None:
    model = build(family)
    set_model(model, tune_mm_vision=trained.vision, tune_mm_mlp=trained.merger, tune_mm_llm=trained.language)
    batch, measures = one_batch(model)
    # Of linear attention, torch leaves out the triangular systems of the forward pass, and counts the backward pass of
    # the depthwise convolution as that of a full one.
    exactness = (0.005, 0.03) if get_family(family).linear_attention else (1e-6, 1e-6)
    tower = f"{type(model).__name__}.model.visual"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        causal_loss(model, batch, num_trained_tokens=1.0)
    forward = training_flops(model.config, get_family(family), Trained(False, False, False), causal=False)
    assert forward.count(measures) == pytest.approx(count_products(counter), rel=exactness[0])
    vision = sum(counter.get_flop_counts()[tower].values())
    assert forward.split(measures)[0] == pytest.approx(vision, rel=exactness[0])
    with FlopCounterMode(display=False) as counter:
        causal_loss(model, batch, num_trained_tokens=1.0).backward()
    model.zero_grad()
    both = training_flops(model.config, get_family(family), trained, causal=False)
    assert both.count(measures) == pytest.approx(count_products(counter), rel=exactness[1])


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("alone", [False, True])
def test_flops_of_the_mtp_layer_are_what_torch_counts(
    family: str, alone: bool, build: Callable[[str], PreTrainedModel], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """What training it adds: a language model that is trained too, or frozen below it."""
    found, expected = [], []
    for mtp in (False, True):
        model: Any = AutoModelForImageTextToText.from_config(build(family).config, attn_implementation="eager")
        model.set_experts_implementation("eager")
        model.requires_grad_(not alone)
        if mtp:
            model.add_module("mtp", MultiTokenPrediction(model.model.language_model))
        install(model, patchify_of(tiny_checkpoint(family)), plain_loss)
        batch, measures = one_batch(model)
        positions, targets = batch["kept_positions"] - 1, batch["targets"]
        batch |= {"mtp_inputs": {"positions": positions, "targets": targets}} if mtp else {}
        with FlopCounterMode(display=False) as counter:
            loss = run_model(model, batch).logits.sum()
            if loss.requires_grad:
                loss.backward()
        trained = Trained(not alone, not alone, not alone, mtp=mtp)
        found.append(count_products(counter))
        expected.append(training_flops(model.config, get_family(family), trained, causal=False).count(measures))
    assert expected[1] - expected[0] == pytest.approx(found[1] - found[0], rel=1e-6)


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}], ids=str)
def test_layers_that_are_no_mixture_are_counted_as_such(
    changes: dict[str, Any], build: Callable[..., PreTrainedModel]
) -> None:
    model = build("qwen3_vl_moe", num_hidden_layers=3, **changes)
    mixtures = [hasattr(layer.mlp, "experts") for layer in model.model.language_model.layers]
    assert mixtures == ([False, True, False] if "decoder_sparse_step" in changes else [False, True, True])
    batch, measures = one_batch(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        causal_loss(model, batch, num_trained_tokens=1.0)
    flops = training_flops(model.config, get_family("qwen3_vl_moe"), Trained(False, False, False), causal=False)
    assert flops.count(measures) == pytest.approx(count_products(counter), rel=1e-6)


def _grouped_flops(rows: Sequence[int], matrices: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the operations of a product [S, K] x [experts, K, N], or of its gradient, [K, S] x [S, N]."""
    return 2 * rows[0] * rows[1] * matrices[-1]


@pytest.mark.parametrize("target", ["language", "vision", "merger", "all", "language,experts"])
def test_flops_of_adapters_are_what_torch_counts(target: str, build: Callable[[str], PreTrainedModel]) -> None:
    """Frozen weights have no gradient, adapters do; counted as if a gradient reached the first layer of a part too."""
    family = "qwen3_vl_moe" if "experts" in target else "qwen3_vl"
    model = copy.deepcopy(build(family))
    model.requires_grad_(False)
    add_adapters(model, AdapterSettings(target, r=8, alpha=8, dropout=0.0))
    embeddings = model.get_input_embeddings()
    part = {"language": embeddings, "language,experts": embeddings, "merger": model.model.visual.merger.norm}
    part.get(target, model.model.visual.patch_embed).register_forward_hook(lambda *call: call[2].requires_grad_())
    for merger in model.model.visual.deepstack_merger_list if target == "merger" else ():
        merger.norm.register_forward_hook(lambda *call: call[2].requires_grad_())
    batch, measures = one_batch(model)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops}) as counter:
        causal_loss(model, batch, num_trained_tokens=1.0).backward()
    trained = Trained(False, False, False, adapter_sizes(model, per_token=True))
    expected = training_flops(model.config, get_family(family), trained, causal=False)
    assert expected.count(measures) == pytest.approx(count_products(counter), rel=1e-6)


def test_flops_add_up_and_causal_attention_is_half(build: Callable[[str], PreTrainedModel]) -> None:
    """The cost of a pack is the sum of its samples', and grows with their squares, not with the square of the pack."""
    config, family = build("qwen3_vl").config, get_family("qwen3_vl")
    flops = training_flops(config, family, Trained())
    plan = ImagePlan(ImageItem(""), (0, 0), (1, 16, 24), (0, 0))
    rows = np.array([measure_row(300, 20, [plan]), measure_row(500, 100, [])], MEASURES)
    pack = np.array(tuple(rows[name].sum() for name in MEASURES.names), MEASURES)
    assert flops.count(pack) == pytest.approx(flops.count(rows).sum())
    assert flops.split(rows)[0][1] == 0
    whole = training_flops(config, family, Trained(), causal=False)
    assert whole.language["tokens_squared"] == 2 * flops.language["tokens_squared"]
    assert whole.vision == flops.vision
