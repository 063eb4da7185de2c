"""What is given to the vision tower ready-made, and its first layer, against the stock tower."""

from __future__ import annotations

import pytest
import torch

from qwenvl.models.tower import PatchProjection, describe_grids

GRIDS = [(1, 4, 6), (2, 8, 4), (1, 12, 10)]


def test_the_tower_computes_the_same_from_described_grids(family_name, load_tiny):
    visual = load_tiny(family_name).model.visual.eval()
    config = visual.config
    count = sum(t * h * w for t, h, w in GRIDS)
    patches = torch.randn(count, config.in_channels * config.temporal_patch_size * config.patch_size**2)
    with torch.no_grad():
        stock = visual(patches, grid_thw=torch.tensor(GRIDS)).pooler_output
        ours = visual(patches, **describe_grids(visual, GRIDS, torch.device("cpu"))).pooler_output
    assert torch.equal(ours, stock)


def test_the_tower_reads_no_sizes_but_those_described(family_name, load_tiny):
    """A tensor without memory in their place cannot be read."""
    visual = load_tiny(family_name).model.visual.eval()
    described = describe_grids(visual, GRIDS, torch.device("cpu"))
    described["grid_thw"] = described["grid_thw"].to("meta")
    config = visual.config
    count = sum(t * h * w for t, h, w in GRIDS)
    patches = torch.randn(count, config.in_channels * config.temporal_patch_size * config.patch_size**2)
    visual(patches, **described)


def test_the_product_equals_the_convolution_with_its_gradients():
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(3, 40, kernel_size=(2, 4, 4), stride=(2, 4, 4)).double()
    product = PatchProjection(convolution)
    assert product.state_dict().keys() == convolution.state_dict().keys()
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
