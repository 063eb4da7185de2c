"""What computes in float32 layer by layer gives what the whole model gives in it, and keeps its own weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.families import FAMILIES
from qwenvl.models.adapter_merging import sample_inputs
from qwenvl.models.float32_compute import computing_in_float32


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_widened_in_turn_compute_what_the_wide_model_does(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    path = tiny_checkpoint(family)
    model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).eval()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    inputs = sample_inputs(AutoProcessor.from_pretrained(path), torch.device("cpu"))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()  # as a stock model rounds what its tower is given
    with torch.no_grad(), computing_in_float32(model):
        found = model(**inputs).logits
    for name, value in model.named_parameters():
        assert value.dtype == torch.bfloat16 and value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        rounded = model(**inputs).logits
        wanted = model.float()(**inputs).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (rounded - wanted).abs().max() > 1e-2, "a comparison that shows nothing"


def test_a_model_that_fails_on_the_way_keeps_its_weights(tiny_checkpoint: Callable[[str], Path]) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint("qwen3_vl"), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError), torch.no_grad(), computing_in_float32(model):
        model(input_ids=torch.arange(5, 9)[None], position_ids=torch.zeros(3, 1, 7, dtype=torch.long))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
