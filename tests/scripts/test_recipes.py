"""Recipes and launchers of published models: all from one table, and all of them can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwenvl.config import parse_arguments
from scripts.recipes import files

REPOSITORY = Path(__file__).resolve().parents[2]


FILES = files()


def test_the_files_are_what_the_table_says() -> None:
    found = {path: (REPOSITORY / path).read_text(encoding="utf-8") for path in FILES}
    assert found == FILES, "run python scripts/recipes.py"
    kept = {path.name for kind in ("sft", "lora") for path in (REPOSITORY / "configs").glob(f"{kind}_*.yaml")}
    assert kept == {Path(path).name for path in FILES if path.endswith(".yaml")}


@pytest.mark.parametrize("path", [path for path in FILES if path.endswith(".yaml")])
def test_a_recipe_is_read_as_it_stands(path: str) -> None:
    recipe = yaml.safe_load(FILES[path])
    parsed = parse_arguments([str(REPOSITORY / path)])
    assert parsed.model.model_name_or_path == recipe["model_name_or_path"]
    assert parsed.adapters.lora_enable == path.startswith("configs/lora_")
    assert parsed.training.run_name == Path(path).stem
