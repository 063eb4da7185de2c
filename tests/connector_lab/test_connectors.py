"""Connectors against the libraries' own, and against themselves: pictures do not meet in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, CLIPVisionConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger as StockMerger

from qwenvl.connector_lab.config import CONNECTORS, Connector, LabVisionConfig
from qwenvl.connector_lab.connectors import build_connector, grid_positions
from qwenvl.utils.errors import UserError
from tests.connector_lab.conftest import TINY

WIDTH, OUT = 32, 64
SIZES = [(2, 4), (6, 2), (2, 2), (4, 4)]


def config(connector: Connector, **changed: int) -> LabVisionConfig:
    encoder = CLIPVisionConfig(hidden_size=WIDTH, num_attention_heads=2, patch_size=8, image_size=64)
    return LabVisionConfig(encoder, connector=connector, out_hidden_size=OUT, initializer_range=0.3, **TINY | changed)


def connector(kind: Connector) -> nn.Module:
    torch.manual_seed(0)
    return build_connector(config(kind)).eval()


def features(sizes: list[tuple[int, int]] = SIZES) -> torch.Tensor:
    return torch.randn(sum(height * width for height, width in sizes), WIDTH)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_what_a_picture_becomes_does_not_depend_on_those_beside_it(kind: Connector) -> None:
    module, batch = connector(kind), features()
    with torch.no_grad():
        together = module(batch, SIZES)
        pictures = batch.split([height * width for height, width in SIZES])
        alone = [module(picture, [size]) for picture, size in zip(pictures, SIZES, strict=True)]
    assert together.shape == (sum(len(one) for one in alone), OUT)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_patch_reaches_the_tokens_and_every_weight_gets_a_gradient(kind: Connector) -> None:
    module, batch = connector(kind), features().requires_grad_()
    tokens = module(batch, SIZES)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert batch.grad is not None
    assert (batch.grad.abs().amax(1) > 1e-6).all()
    assert not [name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.any()]


@pytest.mark.parametrize("kind", CONNECTORS)
def test_the_config_says_how_many_tokens_a_picture_has(kind: Connector) -> None:
    said = config(kind)
    each = [said.tokens_per_frame or height * width // said.spatial_merge_size**2 for height, width in SIZES]
    assert len(connector(kind)(features(), SIZES)) == sum(each)


def test_the_qformer_is_that_of_blip2() -> None:
    ours = connector("qformer")
    stock_config = Blip2QFormerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, encoder_hidden_size=WIDTH
    )
    stock = Blip2QFormerModel(stock_config).eval()
    stock.load_state_dict(ours.qformer.state_dict())
    pictures = torch.randn(3, 8, WIDTH)
    with torch.no_grad():
        seen = stock(query_embeds=ours.query_tokens.expand(3, -1, -1), encoder_hidden_states=pictures)
        expected = ours.language_projection(seen.last_hidden_state)
        torch.testing.assert_close(ours(pictures.flatten(0, 1), [(2, 4)] * 3), expected.flatten(0, 1))


def test_the_merger_is_that_of_qwen2_vl() -> None:
    ours, stock = connector("merger"), StockMerger(dim=OUT, context_dim=WIDTH)
    stock.load_state_dict(ours.state_dict())
    batch = features()
    torch.testing.assert_close(ours(batch, SIZES), stock(batch))


def test_the_mlp_is_that_of_llava() -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": WIDTH, "num_attention_heads": 2}
    text = {"model_type": "llama", "hidden_size": OUT, "num_attention_heads": 2}
    ours, stock = connector("mlp"), LlavaMultiModalProjector(LlavaConfig(vision_config=vision, text_config=text))
    stock.load_state_dict(ours.state_dict())
    batch = features()
    torch.testing.assert_close(ours(batch, SIZES), stock(batch))


def plain_positions(height: int, width: int, side: int, channels: int) -> np.ndarray:
    """2-D sine positions, one number after another."""
    table = np.zeros((height * width, channels))
    for row in range(height):
        for column in range(width):
            x, y = (column + 0.5) * side / width - 0.5, (row + 0.5) * side / height - 0.5
            for half, place in enumerate((x, y)):
                for rate in range(channels // 4):
                    angle = place / 10_000 ** (rate / (channels // 4))
                    start = half * channels // 2 + rate
                    table[row * width + column, start] = math.sin(angle)
                    table[row * width + column, start + channels // 4] = math.cos(angle)
    return table


@pytest.mark.parametrize(("height", "width", "side"), [(4, 4, 4), (2, 6, 4), (5, 3, 2)])
def test_positions_are_two_sines_a_place(height: int, width: int, side: int) -> None:
    found = grid_positions((height, width), side, 16, torch.device("cpu"))
    np.testing.assert_allclose(found.numpy(), plain_positions(height, width, side, 16), atol=2e-6)


def test_the_resampler_is_one_cross_attention_with_positions_on_both_sides() -> None:
    """The formula of Qwen-VL's adapter, for one picture and one head at a time."""
    ours, batch = connector("resampler"), features([(3, 5)])
    heads, depth = 2, OUT // 2
    with torch.no_grad():
        values = ours.ln_kv(ours.kv_proj(batch))
        keys = values + torch.tensor(plain_positions(3, 5, 2, OUT), dtype=torch.float32)
        queries = ours.ln_q(ours.query) + torch.tensor(plain_positions(2, 2, 2, OUT), dtype=torch.float32)
        weights, biases = ours.attn.in_proj_weight.chunk(3), ours.attn.in_proj_bias.chunk(3)
        q, k, v = (x @ w.T + b for x, w, b in zip((queries, keys, values), weights, biases, strict=True))
        seen = []
        for head in range(heads):
            part = slice(head * depth, (head + 1) * depth)
            seen.append((q[:, part] @ k[:, part].T / math.sqrt(depth)).softmax(-1) @ v[:, part])
        expected = ours.proj(ours.ln_post(ours.attn.out_proj(torch.cat(seen, -1))))
        torch.testing.assert_close(ours(batch, [(3, 5)]), expected, atol=1e-5, rtol=1e-4)


def test_the_resampler_knows_where_a_patch_is_and_the_mean_does_not() -> None:
    batch, order = features([(4, 4)]), torch.randperm(16)
    for kind, sees in (("resampler", True), ("mean_pool", False)):
        module = connector(kind)  # type: ignore[arg-type]
        moved = (module(batch, [(4, 4)]) - module(batch[order], [(4, 4)])).abs().max()
        assert bool(moved > 1e-3) == sees


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="a square number of queries"):
        build_connector(config("resampler", num_queries=5))
    with pytest.raises(UserError, match="connector_heads 3 does not divide"):
        build_connector(config("qformer", connector_heads=3))
    with pytest.raises(UserError, match="'mlpp' is not one of"):
        build_connector(config("mlpp"))  # type: ignore[arg-type]
