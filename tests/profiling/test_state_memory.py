"""Memory of weights, gradients and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from qwenvl.profiling.state_memory import StateSharding, estimate_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adam_keeps_two_numbers_of_the_type_of_the_weights(
    dtype: torch.dtype, tiny_checkpoint: Callable[[str], Path]
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint("qwen3_vl"), dtype=dtype)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    states = estimate_states(model, StateSharding("one process", 0, 1), "adamw_torch_fused", dtype, dtype)
    assert states.optimizer == kept
    masters = estimate_states(model, StateSharding("ZeRO-2", 2, 1, masters=True), "adamw_torch_fused", dtype, dtype)
    assert masters.optimizer == 12 * model.num_parameters(), "DeepSpeed keeps float32 weights and states"
