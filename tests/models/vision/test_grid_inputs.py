"""What is given to the vision tower ready-made, and its first layer, against the stock tower."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface

from qwenvl.models.vision.grid_inputs import PatchProjection, grid_describer, place_grids

GRIDS = [(1, 4, 6), (2, 8, 4), (1, 12, 10)]


def described_for(visual: Any) -> dict[str, Any]:
    """Return the tower's arguments for GRIDS, by way of another process."""
    describer = pickle.loads(pickle.dumps(grid_describer(visual)))
    return place_grids(describer.describe(GRIDS), torch.device("cpu"))


def test_the_tower_computes_the_same_from_described_grids(family_name, load_tiny):
    visual = load_tiny(family_name).model.visual.eval()
    config = visual.config
    count = sum(t * h * w for t, h, w in GRIDS)
    patches = torch.randn(count, config.in_channels * config.temporal_patch_size * config.patch_size**2)
    with torch.no_grad():
        stock = visual(patches, grid_thw=torch.tensor(GRIDS)).pooler_output
        ours = visual(patches, **described_for(visual)).pooler_output
    assert torch.equal(ours, stock)


def test_the_tower_reads_no_sizes_but_those_described(family_name, load_tiny):
    """A tensor without memory in their place cannot be read."""
    visual = load_tiny(family_name).model.visual.eval()
    described = described_for(visual)
    described["grid_thw"] = described["grid_thw"].to("meta")
    config = visual.config
    count = sum(t * h * w for t, h, w in GRIDS)
    patches = torch.randn(count, config.in_channels * config.temporal_patch_size * config.patch_size**2)
    visual(patches, **described)


def varlen(module, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, scaling=None, **kwargs):
    """What the kernels of flash attention compute, a stretch at a time."""
    assert isinstance(max_length_q, int) and max_length_q == kwargs["max_length_k"]
    assert max_length_q == int(cu_seq_lens_q.diff().max()) and cu_seq_lens_q is kwargs["cu_seq_lens_k"]
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def test_flash_attention_is_told_borders_and_longest_stretches(family_name, load_tiny):
    """By a reference in the place of its kernels, under a name that transformers takes for one of theirs."""
    AttentionInterface.register("flash_attention_reference", varlen)
    visual = load_tiny(family_name).model.visual.eval()
    config = visual.config
    count = sum(t * h * w for t, h, w in GRIDS)
    patches = torch.randn(count, config.in_channels * config.temporal_patch_size * config.patch_size**2)
    with torch.no_grad():
        stock = visual(patches, grid_thw=torch.tensor(GRIDS)).pooler_output
        assert not any(name.startswith("max") for name in described_for(visual))
        config._attn_implementation = "flash_attention_reference"
        described = described_for(visual)
        ours = visual(patches, **described).pooler_output
    assert described["max_seqlen"] == 120
    assert ("max_window_seqlen" in described) == ("cu_window_seqlens" in described) == (family_name == "qwen2_5_vl")
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_the_product_equals_the_convolution_with_its_gradients():
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 40, kernel_size=(2, 4, 4), stride=(2, 4, 4)).double()
    product = PatchProjection(convolution)
    assert product.state_dict().keys() == convolution.state_dict().keys()
    assert str(product) == str(convolution).replace("Conv3d", "PatchProjection")
    patches = torch.randn(50, 3, 2, 4, 4, dtype=torch.float64)
    expected = convolution(patches).view(-1, 40)
    torch.testing.assert_close(product(patches), expected)
    weights = torch.randn(50, 40, dtype=torch.float64)
    stock = torch.autograd.grad((expected * weights).sum(), list(convolution.parameters()))
    ours = torch.autograd.grad((product(patches) * weights).sum(), list(product.parameters()))
    torch.testing.assert_close(ours, stock)


def test_patches_that_overlap_are_not_taken_for_a_product():
    with pytest.raises(AssertionError):
        PatchProjection(torch.nn.Conv3d(3, 8, kernel_size=4, stride=2))
