"""Published ``config.json`` files: each builds, and has the tensors and bytes of its published weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.families import get_family
from qwenvl.models.mtp.layer import MTP, MultiTokenPrediction

NAMES = (
    *("Qwen3-VL-2B-Instruct", "Qwen3-VL-4B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-32B-Instruct"),
    *("Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-235B-A22B-Instruct"),
    *("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B"),
    *("Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B"),
    *("Qwen3.6-27B", "Qwen3.6-35B-A3B", "Qwen3.8-27B"),
)
BYTES = {
    "Qwen3.5-27B": 55_562_872_800,
    "Qwen3.8-27B": 55_562_855_904,
    "Qwen3.5-35B-A3B": 71_903_655_008,
    "Qwen3.6-35B-A3B": 71_903_645_408,
}
"""``total_size`` of the published indexes. Qwen3.5 stores a part of linear attention in float32, the others do not."""


@pytest.fixture
def configs(shared_folder: Path) -> Path:
    return shared_folder / "processors" / "configs"


def tensors_of(config: Any) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the meta device, by the names that transformers has in memory."""
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
        tensors = dict(model.named_parameters())  # without tied ones
        if get_family(config.model_type).mtp:
            layer = MultiTokenPrediction(model.model.language_model)
            tensors |= {f"{MTP}.{name}": value for name, value in layer.state_dict().items()}
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_builds_with_the_layers_that_it_promises(configs: Path, name: str) -> None:
    config = AutoConfig.from_pretrained(configs / f"{name}.json")
    tensors = tensors_of(config)
    layers = {part for part in tensors if part.startswith("mtp.layers.") and part.endswith("input_layernorm.weight")}
    assert len(layers) == getattr(config.get_text_config(), "mtp_num_hidden_layers", 0)
    if name in BYTES:
        wide = ("linear_attn.A_log", "linear_attn.norm.weight") if name.startswith("Qwen3.5") else ()
        sizes = {part: 4 if part.endswith(wide) and wide else 2 for part in tensors}
        assert sum(sizes[part] * value.numel() for part, value in tensors.items()) == BYTES[name]


def test_names_are_those_of_the_published_index(configs: Path) -> None:
    index = json.loads((configs / "extra" / "model.safetensors.index.Qwen3.8-27B.json").read_text())
    assert tensors_of(AutoConfig.from_pretrained(configs / "Qwen3.8-27B.json")).keys() == index["weight_map"].keys()


@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-9B", "Qwen3.8-27B", "Qwen3.6-35B-A3B"])
def test_the_layer_for_multi_token_prediction_has_the_published_shapes(
    configs: Path, shared_folder: Path, name: str
) -> None:
    published = json.loads((shared_folder / "processors" / "mtp_shapes.json").read_text())[name]
    tensors = tensors_of(AutoConfig.from_pretrained(configs / f"{name}.json"))
    assert {part: list(value.shape) for part, value in tensors.items() if part.startswith("mtp.")} == published
