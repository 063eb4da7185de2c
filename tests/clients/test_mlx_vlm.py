"""Saved folders in mlx-vlm: the prompts of training, and the log-probabilities of its greedy answers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.reference import log_probabilities, open_float32, rows_of
from tests.clients.test_transformers4 import request_of

pytestmark = [pytest.mark.slow, pytest.mark.client("mlx-vlm", kind="whole; text, images", arguments="none")]
SCRIPT = Path(__file__).with_name("mlx_answers.py")


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_prompts_and_answers(
    family: str, mlx_vlm: Path, trained: Callable[..., Path], registry: Path, tmp_path: Path
) -> None:
    folder = trained(family)
    rows = list(rows_of(folder, "--dataset_registry", str(registry), "--dataset_use", "images"))
    requests, answers = tmp_path / "requests.json", tmp_path / "answers.json"
    requests.write_text(json.dumps([(request_of(row)["messages"], row.arguments()) for row in rows]))
    command = [mlx_vlm / "bin" / "python", SCRIPT, folder, requests, answers]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = open_float32(folder)
    for row, found in zip(rows, json.loads(answers.read_text()), strict=True):
        assert found["ids"] == row.inputs().input_ids.tolist(), row.name
        own = log_probabilities(model, row, found["answer"])
        assert len(own) > 2 and found["logprobs"] == pytest.approx(own, abs=1e-4), row.name
