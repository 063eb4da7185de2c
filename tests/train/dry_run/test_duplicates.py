"""The dry run warns about training samples that repeat, and about evaluation data that is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.train.dry_run import duplicates
from qwenvl.train.train_qwen import main
from tests.e2e.runs import flags


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    images = [Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC) for one in noise]
    images += [images[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), images[1].resize((90, 90))]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    entries = {}
    for name, used in (("train", (0, 1, 2, 3)), ("held_out", (4,))):
        turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "Noise."}]
        rows = [{"image": f"{index}.png", "conversations": turns} for index in used]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        entries[name] = {"annotation_path": str(tmp_path / f"{name}.json"), "data_path": str(tmp_path)}
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}")
    return tmp_path / "registry.py"


def test_warnings(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen: dict[str, Any] = {"dataset_use": "train", "eval_dataset_use": "held_out", "max_steps": 1}
    assert main([*flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **chosen), "--dry_run"]) == 0
    said = [one.getMessage() for one in caplog.records if one.name == duplicates.__name__]
    train, held_out = tmp_path / "train.json", tmp_path / "held_out.json"
    assert len(said) == 2
    repeated, leaked = (f"The first, dataset 'train', {train}:{line}: it" for line in (4, 2))
    assert said[0].startswith(
        f"Training samples that nearly repeat an earlier one: 1. {repeated} has the same media (mirrored) and 100% of "
        f"its text in common with dataset 'train', {train}:1."
    )
    assert said[1].startswith(
        f"Training samples that show what the evaluation data show: 1. {leaked}s image or clip is in the evaluation "
        f"data too: dataset 'held_out', {held_out}:1."
    )
