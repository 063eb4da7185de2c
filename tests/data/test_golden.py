"""Token ids, labels, grids, positions and pixels of the official recipe, for real samples and the real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenvl.cli.show_sample import main as show_sample

SETTINGS = {
    "default": [],
    "sft_sh": ["--min_pixels", "784", "--max_pixels", "50176"],
}
CASES = [(model, settings) for model in ("qwen3vl", "qwen2.5vl") for settings in SETTINGS]


@pytest.mark.parametrize(("model", "settings"), CASES)
def test_equals_the_official_recipe(model: str, settings: str, shared_folder: Path, tmp_path: Path) -> None:
    golden = shared_folder / "golden"
    folder = golden / f"{model}-{settings}"
    expected = json.loads((folder / "expected.json").read_text())
    samples = [s for s in json.loads((golden / "samples.json").read_text()) if s["id"] in expected]
    annotations, output = tmp_path / "samples.json", tmp_path / "out.jsonl"
    annotations.write_text(json.dumps(samples))
    processor = shared_folder / "processors" / model.replace("2.5", "2_5")
    flags = ["--annotation_path", str(annotations), "--data_path", str(golden / "media")]
    flags += ["--model_name_or_path", str(processor), "--all", "--json", str(output), *SETTINGS[settings]]
    assert show_sample(flags) == 0
    ours = {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert set(ours) == set(expected)
    for name in expected:
        compare(ours[name], np.load(folder / f"{name}.npz"), expected[name])


def compare(ours: dict[str, Any], arrays: Any, statistics: dict[str, Any]) -> None:
    assert ours["input_ids"] == arrays["input_ids"][0].tolist()
    assert ours["labels"] == arrays["labels"][0].tolist()
    assert ours["position_ids"] == arrays["position_ids"][:, 0].tolist()
    for grid in ("image_grid_thw", "video_grid_thw"):
        assert (ours[grid] or []) == (statistics[grid] or [])
    for pixels in ("pixel_values", "pixel_values_videos"):
        theirs = statistics[pixels]
        assert (ours[pixels] is None) == (theirs is None)
        if theirs is not None:
            assert ours[pixels]["shape"] == theirs["shape"]
            assert ours[pixels]["mean"] == pytest.approx(theirs["mean"], abs=1e-2)
            assert ours[pixels]["std"] == pytest.approx(theirs["std"], abs=1e-2)
