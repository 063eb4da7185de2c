"""Each recipe of ``configs/`` dry-runs on the published config of its model, with the real tokenizer and no weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwenvl.train.train_qwen import main
from scripts.recipes import MODELS
from tests.e2e.runs import REPOSITORY

FAST = ("qwen3_5_0_8b", "qwen3vl_2b")
RELATIVES = {"Qwen3.5-122B-A10B": "qwen3_5_35b_a3b", "Qwen3.5-397B-A17B": "qwen3_5_35b_a3b"}
"""Published configs without recipes of their own, and the recipes that serve for them."""

PUBLISHED = [(model.repository.removeprefix("Qwen/"), model.name) for model in MODELS] + list(RELATIVES.items())
CASES = [
    pytest.param(name, f"{kind}_{recipe}", marks=[] if recipe in FAST else pytest.mark.slow)
    for name, recipe in PUBLISHED
    for kind in ("sft", "lora")
    if not recipe.startswith("qwen2")  # whose config is not among the published ones
]


def checkpoint(name: str, shared: Path, folder: Path) -> Path:
    """Link config, tokenizer and processor of a published checkpoint into a folder; there are no weights."""
    small = name in ("Qwen3.5-0.8B", "Qwen3.5-2B")
    processor = "qwen3vl" if name.startswith("Qwen3-VL") else f"qwen3_{name[6]}{'_small' if small else ''}"
    folder.mkdir()
    for file in (shared / "processors" / processor).iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").symlink_to(shared / "processors" / "configs" / f"{name}.json")
    return folder


def test_every_published_config_has_a_case(shared_folder: Path) -> None:
    configs = {path.stem for path in (shared_folder / "processors" / "configs").glob("*.json")}
    assert configs == {name for name, recipe in PUBLISHED if not recipe.startswith("qwen2")}


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_dry_runs_without_weights(
    name: str, recipe: str, shared_folder: Path, registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(name, shared_folder, tmp_path / name)
    own = {"model_name_or_path": folder, "dataset_registry": registry, "output_dir": tmp_path / "out"}
    asked = {**own, "dataset_use": "pictures,text", "dry_run": True, "dry_run_devices": 64}
    flags = [str(text) for key, value in asked.items() for text in (f"--{key}", value)]
    assert main([str(REPOSITORY / "configs" / f"{recipe}.yaml"), *flags]) == 0
    assert "has no weights: its shapes are those of config.json" in caplog.text
    text = next(record.message for record in caplog.records if record.message.startswith("Dry run"))
    (parameters,) = re.findall(r"^parameters +([\d,]+)$", text, re.MULTILINE)
    billions = float(re.search(r"-([\d.]+)B", name)[1])  # first of "-35B-A3B"
    assert int(parameters.replace(",", "")) / 1e9 == pytest.approx(billions, rel=0.2)
