#!/usr/bin/env python
"""The table of docs/compatibility.md: what tests/clients found, kept in docs/compatibility.json.

    python scripts/compatibility_page.py    writes the page's table from the data, after a merge for example

``bash scripts/test.sh --clients`` records each test in both as it ends. The text around the table is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
FAMILIES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5-MoE",
}
"""Names of the families, by ``model_type``."""


@dataclass(frozen=True)
class Row:
    """What a test found, or is to find if it passes.

    Args:
        client: Name of the program.
        family: ``model_type`` of the model.
        kind: Kind of training and of data, in words.
        result: Result in words, such as "exact".
        arguments: Arguments that the program was given.
        version: Version of the program, and of the libraries that it stands on.
        date: Day of the test's last run, as YYYY-MM-DD.
    """

    client: str
    family: str
    kind: str
    result: str = "exact"
    arguments: str = ""
    version: str = ""
    date: str = ""


def read_rows(folder: Path = DOCS) -> dict[str, Row]:
    """Return the rows by the ids of their tests."""
    found = json.loads((folder / "compatibility.json").read_text(encoding="utf-8"))
    return {test: Row(**row) for test, row in found.items()}


def record(test: str, row: Row, folder: Path = DOCS) -> None:
    """Write the result of a test into the data and the page; those of other tests stay."""
    rows = {**read_rows(folder), test: row}
    text = json.dumps({name: asdict(rows[name]) for name in sorted(rows)}, indent=2)
    (folder / "compatibility.json").write_text(text + "\n", encoding="utf-8")
    write_page(folder)


def write_page(folder: Path = DOCS) -> None:
    """Write the page's table from the data."""
    page = folder / "compatibility.md"
    page.write_text(replace_table(page.read_text(encoding="utf-8"), table_of(read_rows(folder))), encoding="utf-8")


def table_of(rows: Mapping[str, Row]) -> str:
    """Return the Markdown table; families that differ in nothing else share a line."""
    lines: dict[Row, list[str]] = {}
    for row in sorted(rows.values(), key=lambda row: (row.client.lower(), list(FAMILIES).index(row.family))):
        families = lines.setdefault(replace(row, family=""), [])
        families += [] if FAMILIES[row.family] in families else [FAMILIES[row.family]]
    table = ["| program | family | kind | result | arguments | date |", "|---|---|---|---|---|---|"]
    for row, families in lines.items():
        program = f"{row.client} {row.version}"
        cells = (program, ", ".join(families), row.kind, row.result, row.arguments, row.date)
        table.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(table)


def replace_table(page: str, table: str) -> str:
    """Return the page with another table behind its line ``<!-- tested -->``."""
    return re.sub(r"(<!-- tested -->\n)(?:\|.*\n)*", lambda found: f"{found[1]}{table}\n", page)


if __name__ == "__main__":
    write_page()
