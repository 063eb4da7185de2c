"""The command on a package of one file: what is noticed, what is not, and what makes no difference."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.operators import mutants, sample

HERE = Path(__file__).resolve().parent
THING = """
def larger(a: int, b: int) -> int:
    \"\"\"Return the larger number.\"\"\"
    if a > b:
        return a
    return b


def spin(number: int) -> int:
    while not number:
        pass
    return number


def unused(flag: bool = True) -> bool:
    return not flag
"""
TESTS = """
from qwenvl.data.thing import larger, spin

def test_larger() -> None:
    assert (larger(1, 3), larger(3, 2)) == (3, 3)

def test_spin() -> None:
    assert spin(2) == 2

def test_red() -> None:
    assert larger(1, 2) == 1
"""
SETTINGS = """
core:
  qwenvl/data/thing.py:
equivalent:
- {file: qwenvl/data/thing.py, function: larger, before: "if a > b:", after: "if a >= b:", reason: "equal numbers"}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository of one file, with a function that is tested, one that may never end, and one without a test."""
    shutil.copytree(HERE, tmp_path / "tests" / "mutation", ignore=shutil.ignore_patterns("test_*", "__pycache__"))
    shutil.copy(HERE.parents[1] / "pyproject.toml", tmp_path)
    for name, text in (
        ("qwenvl/data/thing.py", THING),
        ("tests/data/test_thing.py", TESTS),
        ("tests/mutation/core.yaml", SETTINGS),
        ("tests/__init__.py", ""),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_the_tests_notice(project: Path) -> None:
    command = [sys.executable, "-m", "tests.mutation", "--per-file", "0", "--patience", "10"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert "left out, as it fails without a change: tests/data/test_thing.py::test_red" in done.stdout, done.stderr
    assert "unused: logic, no test runs it\n- return not flag\n+ return flag" in done.stdout
    assert "larger" not in done.stdout.replace("test_larger", ""), (
        "each of its changes is noticed, or makes no difference"
    )
    assert "spin" not in done.stdout, "a change by which the test never ends is noticed"
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("qwenvl/data/thing.py ")]
    total, killed, survived, rate, equivalent = row[1:]
    assert int(killed) + int(survived) == int(total)
    assert (survived, equivalent) == ("3", "1")
    assert rate == f"{int(killed) / int(total):.0%}"
    assert done.returncode == 1, "less than the share that is needed"
    assert (project / "qwenvl/data/thing.py").read_text() == THING, "no file is changed"


def test_a_change_is_one_place_and_the_tree_stays_as_it_is() -> None:
    tree = ast.parse(THING)
    before = ast.unparse(tree)
    found = mutants(tree)
    codes = {mutant.compiled(tree, "thing.py") for mutant in found}
    assert ast.unparse(tree) == before
    assert len(codes) == len(found) == 8
    namespace: dict[str, object] = {}
    (changed,) = [mutant for mutant in found if mutant.after == "if a >= b:"]
    assert (changed.kind, changed.function, changed.lines) == ("boundary", "larger", (4,))
    exec(changed.compiled(tree, "thing.py"), namespace)


def test_samples_are_the_same_again_and_are_of_every_kind() -> None:
    drawn = [(one.before, one.after) for one in sample(mutants(ast.parse(THING)), 5, seed=0)]
    moved = ast.parse("import os\n\n\ndef first(a):\n    return a < os.getpid()\n" + THING)
    assert drawn == [(one.before, one.after) for one in sample(mutants(ast.parse(THING)), 5, seed=0)]
    assert drawn != [(one.before, one.after) for one in sample(mutants(ast.parse(THING)), 5, seed=1)]
    kept = [one for one in sample(mutants(moved), 0, seed=0) if one.function != "first"]
    assert {(one.before, one.after) for one in kept} >= set(drawn)
    kinds = {one.kind for one in mutants(ast.parse(THING))}
    assert {one.kind for one in sample(mutants(ast.parse(THING)), len(kinds), seed=0)} == kinds
