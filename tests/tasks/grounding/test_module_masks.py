"""From maps to masks: the U-Net, the loss, and SAM, held against transformers' own forward and processor."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torch.nn import functional
from transformers import SamImageProcessor, SamModel

from qwenvl.tasks.grounding.sam import MaskRefiner, box_around
from qwenvl.tasks.grounding.unet import MaskUNet, mask_loss
from tests.tasks.grounding.sam import save_tiny_sam


def test_a_mask_does_not_depend_on_the_masks_beside_it() -> None:
    torch.manual_seed(0)
    unet, maps = MaskUNet(6, channels=4), torch.rand(3, 6, 5, 7)
    together = unet(maps, (11, 16))
    assert together.shape == (3, 11, 16)
    alone = torch.cat([unet(one[None], (11, 16)) for one in maps])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_where_counts_and_not_how_much() -> None:
    unet, maps = MaskUNet(2, channels=4), torch.rand(1, 2, 4, 4)
    scaled = maps * torch.tensor([0.01, 30.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(unet(maps, (8, 8)), unet(scaled, (8, 8)), atol=1e-5, rtol=1e-4)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = MaskUNet(2, channels=4)
    torch.rand(3)
    second, other = MaskUNet(2, channels=4), MaskUNet(2, channels=4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.classify.weight, other.classify.weight)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_loss_is_cross_entropy_and_dice(height: int, width: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits, target = generator.normal(size=(height, width)), generator.random((height, width))
    chances = 1 / (1 + np.exp(-logits))
    entropy = -(target * np.log(chances) + (1 - target) * np.log(1 - chances)).mean()
    dice = 1 - (2 * (chances * target).sum() + 1) / (chances.sum() + target.sum() + 1)
    found = mask_loss(torch.tensor(logits), torch.tensor(target))
    assert float(found) == pytest.approx(entropy + dice, rel=1e-5)


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sam(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def refiner(sam: Path) -> MaskRefiner:
    return MaskRefiner.from_checkpoint(str(sam), layers=3, hidden_size=8).eval()


def test_sam_is_prompted_as_its_own_forward_takes_prompts(sam: Path, refiner: MaskRefiner) -> None:
    """Without words, it is stock SAM with a box and a mask, cut and resized as its processor does."""
    generator = np.random.default_rng(0)
    picture = torch.from_numpy(generator.integers(0, 256, (40, 64, 3), dtype=np.uint8))
    coarse = torch.full((10, 16), -3.0)
    coarse[2:6, 4:9] = 4.0
    model, processor = SamModel.from_pretrained(sam).eval(), SamImageProcessor.from_pretrained(sam)
    inputs = processor(Image.fromarray(picture.numpy()), return_tensors="pt")
    whole = functional.interpolate(coarse[None, None], size=(40, 64), mode="bilinear")
    inside = (whole[0, 0] > 0).nonzero()
    box = [*inside.min(0).values.flip(0).tolist(), *(inside.max(0).values.flip(0) + 1).tolist()]
    mask = functional.interpolate(functional.pad(whole, (0, 0, 0, 24), value=-3.0), size=(16, 16), mode="bilinear")
    with torch.no_grad():
        wanted = model(
            pixel_values=inputs["pixel_values"],
            input_boxes=torch.tensor([[box]], dtype=torch.float32),
            input_masks=mask,
            multimask_output=False,
        ).pred_masks[:, 0]
        found = refiner(refiner.encode(picture), (40, 64), coarse, torch.zeros(0, 16), (40, 64))
    wanted = functional.interpolate(wanted, size=(64, 64), mode="bilinear")[0, 0, :40]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_words_and_the_coarse_mask_reach_the_finer_one_and_train(refiner: MaskRefiner) -> None:
    picture = torch.randint(0, 256, (30, 50, 3), dtype=torch.uint8)
    coarse = torch.randn(8, 12, requires_grad=True)
    states = [torch.randn(2, 8) for _ in range(3)]
    refiner.zero_grad()
    found = refiner(refiner.encode(picture), (30, 50), coarse, refiner.words(states), (20, 33))
    assert found.shape == (20, 33)
    found.square().mean().backward()
    assert coarse.grad is not None and coarse.grad.abs().max() > 0
    for name, parameter in refiner.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if name.startswith("words."):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("rows", "columns", "expected"), [((2, 5), (1, 3), [1, 2, 3, 5]), ((0, 0), (0, 0), [0, 0, 9, 7])]
)
def test_boxes_around_masks(rows, columns, expected) -> None:
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[slice(*rows), slice(*columns)] = True
    assert box_around(mask).tolist() == expected
