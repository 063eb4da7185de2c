"""docs/scaling.md: its tables are those of the script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.scaling_page import COUNTS, GPUS, MODELS, PAGE, replace_table, table_of

TABLES = [MODELS[0], *(pytest.param(name, marks=pytest.mark.long) for name in MODELS[1:])]


@pytest.mark.slow
@pytest.mark.parametrize("model", TABLES)
def test_a_table_is_what_the_script_writes(model: str, shared_folder: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"<!-- {model} -->" not in page:
        pytest.skip("this model has no table yet")
    table = table_of(shared_folder / "processors" / "configs" / f"{model}.json")
    assert replace_table(page, model, table) == page, "run python scripts/scaling_page.py CONFIGS"


def test_every_table_has_its_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"<!-- {MODELS[0]} -->" in page
    for model in re.findall(r"<!-- (\S+) -->", page):
        table = page.partition(f"<!-- {model} -->\n")[2].partition("\n\n")[0]
        assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
            f"{count} x {gpu}" for count in COUNTS for gpu in GPUS
        ]
        assert replace_table(page, model, "") != page
