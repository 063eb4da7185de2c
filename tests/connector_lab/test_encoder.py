"""Encoders behind the lab's form give the features of the stock models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText

from qwenvl.connector_lab.encoder import encode_patches, frame_sizes
from qwenvl.data.encoding.processor import open_processor

SIZES = [(64, 64), (64, 64), (48, 96), (64, 64)]


def pictures() -> list[Image.Image]:
    """Pictures of several sizes, (height, width) in pixels."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def patches_of(folder: Path, shown: list[Image.Image]) -> dict[str, torch.Tensor]:
    images: Any = open_processor(str(folder)).image_processor  # type: ignore[attr-defined]
    return images(shown, do_resize=False, return_tensors="pt")


def features_of(folder: Path, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    visual = AutoModelForImageTextToText.from_pretrained(folder).model.visual.eval()
    with torch.no_grad():
        return encode_patches(visual.encoder, visual.config, patches, grids, frame_sizes(grids.tolist()))


@pytest.mark.parametrize(("kind", "dropped"), [("clip", 1), ("siglip", 0)])
@pytest.mark.parametrize("connector", ["mlp", "merger"])
def test_whole_pictures_get_the_features_of_the_stock_encoder(
    lab: Callable[..., Path], part: Callable[[str], Path], kind: str, dropped: int, connector: str
) -> None:
    folder = lab(kind, connector=connector)
    inputs = patches_of(folder, pictures())
    found = features_of(folder, inputs["pixel_values"], inputs["image_grid_thw"])
    stock = AutoModel.from_pretrained(part(kind)).eval()
    images = AutoImageProcessor.from_pretrained(part(kind))
    expected = []
    for picture in pictures():
        pixels = images([picture], do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = stock(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        height, width = (side // 8 for side in (picture.height, picture.width))
        hidden = output.hidden_states[-1 - dropped] if dropped else output.last_hidden_state
        rows = hidden[0, hidden.shape[1] - height * width :]
        if connector == "merger":  # 2x2 patches together
            rows = rows.reshape(height // 2, 2, width // 2, 2, -1).transpose(1, 2).flatten(0, 3)
        expected.append(rows)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_towers_get_the_features_of_the_stock_tower_before_its_merger(
    lab: Callable[..., Path], part: Callable[[str], Path], kind: str
) -> None:
    folder = lab(kind, connector="merger")
    shown = [picture.resize((128, 64)) for picture in pictures()[:2]]
    side = 14 if kind == "qwen2_vl" else 16
    shown = [picture.resize((8 * side, 4 * side)) for picture in shown]
    inputs = patches_of(folder, shown)
    stock = AutoModelForImageTextToText.from_pretrained(part(kind)).model.visual.eval()
    with torch.no_grad():
        expected = stock(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).last_hidden_state
    torch.testing.assert_close(
        features_of(folder, inputs["pixel_values"], inputs["image_grid_thw"]), expected, atol=1e-5, rtol=1e-4
    )


def test_a_tower_reads_row_by_row_what_it_reads_in_blocks(lab: Callable[..., Path]) -> None:
    """Connectors but the merger get patches row by row: the same features in another order."""
    shown = [pictures()[0].resize((4 * 16, 4 * 16))]
    found = []
    for connector in ("merger", "mlp"):
        folder = lab("qwen3_vl", connector=connector)
        inputs = patches_of(folder, shown)
        found.append(features_of(folder, inputs["pixel_values"], inputs["image_grid_thw"]))
    blocks, rows = found
    torch.testing.assert_close(blocks.reshape(2, 2, 2, 2, -1).transpose(1, 2).flatten(0, 3), rows, atol=1e-5, rtol=1e-4)
