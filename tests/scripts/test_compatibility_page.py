"""docs/compatibility.md: its table is that of the data, whose rows tests of tests/clients wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.compatibility_page import DOCS, FAMILIES, Row, read_rows, record, replace_table, table_of

REPOSITORY = DOCS.parent
EXACT = Row("transformers", "qwen3_vl", "whole", "exact", "none", "4.0", "2020-01-01")

TEST = """
import os, pytest
pytestmark = pytest.mark.client("vLLM", kind="none")

@pytest.fixture
def program():
    {program}

@pytest.mark.client({mark}, family="qwen3_vl")
def test_one(program):
    {body}
"""


def run_pytest(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(words, env=os.environ | environment, cwd=cwd, capture_output=True, text=True)


def test_the_page_shows_the_data() -> None:
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    assert replace_table(page, table_of(read_rows())) == page, "run python scripts/compatibility_page.py"
    assert replace_table(page, "") != page


@pytest.mark.slow  # imports what the tests import
def test_every_row_names_a_test() -> None:
    done = run_pytest("--collect-only", "tests/clients")
    tests = done.stdout.splitlines()
    missing = [test for test in read_rows() if test not in tests]
    assert done.returncode == 0 and not missing, f"take these rows out of docs/compatibility.json: {missing}"


def test_families_share_a_line_where_nothing_else_differs() -> None:
    rows = {str(place): replace(EXACT, family=family) for place, family in enumerate(FAMILIES)}
    rows["2"] = replace(rows["2"], result="**FAILED**")
    first, second = table_of(rows).splitlines()[2:]
    assert first.startswith("| transformers 4.0 | Qwen2-VL, Qwen2.5-VL, Qwen3-VL-MoE, ")
    assert second == "| transformers 4.0 | Qwen3-VL | whole | **FAILED** | none | 2020-01-01 |"


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Mapping[str, Row]]:
    """Return a function that runs the body of a test with the recorder, whose row was exact; returns the rows then."""
    (tmp_path / "compatibility.md").write_text("Above.\n\n<!-- tested -->\n\nBelow.\n")
    (tmp_path / "compatibility.json").write_text("{}")
    for name in ("one", "other"):
        record(f"test_it.py::test_{name}", EXACT, tmp_path)
    hooks = "pytest_itemcollected, pytest_runtest_makereport"
    (tmp_path / "conftest.py").write_text(f"from tests.clients.recording import {hooks}  # noqa: F401\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    client\n")

    def function(
        body: str, program: str = "pass", folder: Path | str = tmp_path, mark: str = "kind='whole', result='same'"
    ) -> Mapping[str, Row]:
        (tmp_path / "test_it.py").write_text(TEST.format(mark=mark, body=body, program=program))
        paths = {"PYTHONPATH": str(REPOSITORY), "CLIENTS_RECORD": str(folder), "CLIENTS_VLLM": sys.prefix}
        run_pytest(cwd=tmp_path, **paths)
        page = (tmp_path / "compatibility.md").read_text()
        assert page == f"Above.\n\n<!-- tested -->\n{table_of(read_rows(tmp_path))}\n\nBelow.\n"
        return read_rows(tmp_path)

    return function


def test_a_test_that_passes_writes_its_row(recorded: Callable[..., Mapping[str, Row]]) -> None:
    rows = recorded("pass")
    one = rows["test_it.py::test_one"]
    assert (one.client, one.kind, one.result) == ("vLLM", "whole", "same") and one.date > EXACT.date
    assert rows["test_it.py::test_other"] == EXACT


@pytest.mark.parametrize(
    ("body", "program", "result"),
    [
        ("assert False", "pass", "**FAILED**"),
        ("pass", "assert False", "**FAILED**"),
        ("pytest.xfail('known')", "pass", "**FAILED**"),
        ("os._exit(1)", "pass", "**did not finish**"),
        ("pass", "pytest.skip('not installed')", "exact"),
    ],
)
def test_no_result_outlives_a_failure(
    body: str, program: str, result: str, recorded: Callable[..., Mapping[str, Row]]
) -> None:
    assert recorded(body, program)["test_it.py::test_one"].result == result


def test_nothing_is_written_unless_asked_for(recorded: Callable[..., Mapping[str, Row]]) -> None:
    assert set(recorded("pass", folder="").values()) == {EXACT}
    assert set(recorded("pass", mark="kind=''").values()) == {EXACT}  # marks that make no row stop everything
