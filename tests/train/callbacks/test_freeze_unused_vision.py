"""A step without pictures leaves the vision tower where it is (ZeRO-3: see test_invariance.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import changed, train

VISUAL = ("model.visual", "visual")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_text_alone_does_not_move_the_tower(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """AdamW decays a weight whose gradient is zero, and one whose gradient was not zero before."""
    model = tiny_checkpoint(family)
    output = train(model, tmp_path / "run", registry, dataset_use="text", lr_scheduler_type="linear")
    assert changed(model, output)
    assert not changed(model, output, VISUAL)


def test_the_tower_moves_again_with_the_next_picture(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint("qwen3_vl")
    output = train(model, tmp_path / "run", registry, per_device_train_batch_size=1, max_steps=11)
    assert {name for name in changed(model, output, VISUAL) if "merger" not in name}
