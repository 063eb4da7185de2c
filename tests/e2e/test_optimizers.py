"""Optimizers other than plain AdamW, through the command line: they train, keep the parts' rates, and resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import changed, equal_bits, history, train, weights

OPTIMIZERS = {
    **dict.fromkeys(("adafactor", "adamw_torch_fused", "adagrad", "rmsprop", "sgd"), "torch"),
    **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"), "bitsandbytes"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_trains_each_part_at_its_rate_and_resumes(
    name: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    if find_spec(OPTIMIZERS[name]) is None:
        pytest.skip(f"{OPTIMIZERS[name]} is not installed")
    checkpoint = tiny_checkpoint("qwen3_vl")
    settings = {"optim": name, "save_strategy": "steps", "save_steps": 1, "dataset_use": "pictures"}
    settings |= {"lr_scheduler_type": "linear", "vision_tower_lr": 1e-8, "max_steps": 3}
    whole = train(checkpoint, tmp_path / "whole", registry, **settings)
    moved = changed(checkpoint, whole)
    assert any("language_model" in tensor for tensor in moved) and any("merger" in tensor for tensor in moved)
    before, after = weights(checkpoint), weights(whole)
    tower = [name for name in before if "visual.blocks" in name]
    assert max(float((before[name] - after[name]).abs().max()) for name in tower) < 1e-6, "it has the others' rate"

    shutil.copytree(whole / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = train(checkpoint, tmp_path / "resumed", registry, **settings)
    assert history(resumed) == history(whole)
    assert equal_bits(whole, resumed)
    state = torch.load(whole / "checkpoint-2" / "optimizer.pt", weights_only=False)
    assert {group["name"].partition("/")[0] for group in state["param_groups"]} == {"vision", "merger", "language"}
