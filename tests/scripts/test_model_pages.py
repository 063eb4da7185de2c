"""The tables of docs/models are those of the recipes and of the published configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.family_memory import build
from scripts.model_pages import PAGES, SAME, SHAPES, config_of, memory_table, recipe_table
from scripts.recipes import MODELS, REPOSITORY

ANEW = "python scripts/model_pages.py CONFIGS writes it"
FAST = ("Qwen2.5-VL-3B", "Qwen3-VL-2B-Instruct", "Qwen3.5-0.8B")


def page(name: str) -> str:
    return (REPOSITORY / "docs" / "models" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_recipes(name: str) -> None:
    assert recipe_table(name) in page(name), ANEW


def test_every_recipe_has_a_row_and_a_row_of_memory() -> None:
    pages = "".join(map(page, PAGES))
    for model in MODELS:
        assert pages.count(f"| `sft_{model.name}`, `lora_{model.name}` |") == 1
    rows = {name.removesuffix("-Instruct") for names in PAGES.values() for name in names}
    assert {model.title for model in MODELS} <= rows | set(", ".join(SAME.values()).split(", "))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, marks=[] if model in FAST else pytest.mark.slow)
        for name, models in PAGES.items()
        for model in models
    ],
)
def test_memory(name: str, model: str, request: pytest.FixtureRequest) -> None:
    configs = Path() if model in SHAPES else request.getfixturevalue("shared_folder") / "processors" / "configs"
    row = memory_table([config_of(model, configs)], (model,)).splitlines()[-1]
    assert row in page(name), f"{ANEW}: {row}"


@pytest.mark.parametrize(("name", "parameters"), [("Qwen2.5-VL-3B", 3_754_622_976), ("Qwen2.5-VL-7B", 8_292_166_656)])
def test_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert build(config_of(name, Path()), lora=False).num_parameters() == parameters
