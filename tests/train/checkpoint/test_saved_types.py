"""Data types of the weights of a finished model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenvl.train.checkpoint.folder_check import Header
from qwenvl.train.checkpoint.saved_types import SavedTypes

SOURCE = {
    name: Header(Path("model.safetensors"), dtype, shape)
    for name, shape, dtype in (
        ("embed.weight", (1000, 8), "BF16"),
        ("A_log", (8,), "F32"),
        ("mlp.weight", (100, 100, 8), "F8_E4M3"),
        ("mlp.weight_scale_inv", (1, 1), "F32"),
    )
}


@pytest.mark.parametrize(
    ("name", "own", "saved"),
    [
        ("embed.weight", torch.float32, torch.bfloat16),
        ("A_log", torch.float32, torch.float32),
        ("A_log", torch.bfloat16, torch.bfloat16),  # never wider than trained
        ("mlp.weight", torch.float32, torch.bfloat16),  # dequantized: as most of the other weights
        ("new.weight", torch.float32, torch.bfloat16),
        ("embed.weight", torch.float16, torch.float16),  # as wide: values of one may not fit the other
    ],
)
def test_a_tensor_has_the_type_of_the_source(name: str, own: torch.dtype, saved: torch.dtype) -> None:
    assert SavedTypes("auto", SOURCE).of(name, own) == saved
    assert saved in SavedTypes("auto", SOURCE).possible(name, own)


def test_what_is_asked_for_is_done_and_nothing_without_a_source() -> None:
    assert SavedTypes("bfloat16", SOURCE).of("A_log", torch.float32) == torch.bfloat16
    assert SavedTypes("float32", SOURCE).possible("embed.weight", torch.bfloat16) == {torch.float32}
    assert SavedTypes().of("lora_A.weight", torch.float32) == torch.float32


def test_a_name_of_the_model_that_no_file_has_may_have_any_type_of_the_files() -> None:
    types = SavedTypes("auto", SOURCE)
    assert types.possible("A_log", torch.float32) == {torch.float32}
    assert types.possible("model.embed.weight", torch.float32) == {torch.bfloat16, torch.float32}
