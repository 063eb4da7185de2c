"""Patches of frames, against the stock image and video processors of every family: equal to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from qwenvl.families import FAMILIES
from qwenvl.models.vision.patchify import Patchify
from qwenvl.utils.errors import UserError

# frames (0: a picture), and height and width in tokens
MEDIUM = st.tuples(st.integers(0, 7).filter(lambda frames: frames != 1), st.integers(1, 3), st.integers(1, 3))


@pytest.fixture(scope="module", params=list(FAMILIES))
def processor(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Any:
    """The processor of each family in turn, with means and deviations that are not round."""
    found: Any = AutoProcessor.from_pretrained(tiny_checkpoint(request.param))
    for part in (found.image_processor, found.video_processor):
        part.image_mean, part.image_std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return found


def stock(processor: Any, frames: torch.Tensor, still: bool) -> tuple[torch.Tensor, list[int]]:
    """Patches and grid of frames [n, height, width, 3], by the stock processor."""
    options: dict[str, Any] = {"do_resize": False, "return_tensors": "pt"}
    planar = frames.permute(0, 3, 1, 2).contiguous()
    if still:
        made = processor.image_processor(images=[planar[0]], **options)
        return made["pixel_values"], made["image_grid_thw"][0].tolist()
    made = processor.video_processor(videos=[planar], do_sample_frames=False, cap_pixels_per_frame=False, **options)
    return made["pixel_values_videos"], made["video_grid_thw"][0].tolist()


@settings(max_examples=30)
@given(media=st.lists(MEDIUM, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_patches_are_those_of_the_stock_processors(
    processor: Any, media: list[tuple[int, int, int]], seed: int
) -> None:
    """Pictures and videos of every shape mixed, neighbours alike or not, odd numbers of frames."""
    generator, factor = np.random.default_rng(seed), processor.image_processor.patch_size * 2
    pixels, shapes, expected = [], [], []
    for frames, height, width in media:
        size = (max(1, frames), height * factor, width * factor, 3)
        pixels.append(torch.from_numpy(generator.integers(0, 256, size, dtype=np.uint8)))
        patches, grid = stock(processor, pixels[-1], still=frames == 0)
        expected.append(patches)
        shapes.append((size[0], *grid))
    found = Patchify.from_processor(processor)(torch.cat([one.flatten() for one in pixels]), shapes)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("changes", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_what_the_processor_does_not_do_is_not_done(
    tiny_checkpoint: Callable[[str], Path], changes: dict[str, Any]
) -> None:
    processor: Any = AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl"))
    for part in (processor.image_processor, processor.video_processor):
        for name, value in changes.items():
            setattr(part, name, value)
    frames = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    patches, grid = stock(processor, frames, still=True)
    found = Patchify.from_processor(processor)(frames.flatten(), [(1, *grid)])
    torch.testing.assert_close(found, patches.float(), rtol=1e-6, atol=1e-6)


def test_processors_that_normalise_differently_are_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    processor: Any = AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl"))
    processor.video_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(UserError, match="normalise pixels differently"):
        Patchify.from_processor(processor)


def test_it_has_nothing_to_train_or_save(tiny_checkpoint: Callable[[str], Path]) -> None:
    patchify = Patchify.from_processor(AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl")))
    assert list(patchify.parameters()) == []
    assert patchify.state_dict() == {}
    assert copy.deepcopy(patchify).count_patches([(1, 1, 4, 2), (3, 2, 2, 2)]) == 16
