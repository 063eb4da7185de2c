"""The command ``qwenvl``, started as a user starts it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl import __version__
from qwenvl.cli.main import COMMANDS
from qwenvl.train.train_qwen import main as train

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "PIL", "yaml")


def qwenvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call what the script of the installed package calls."""
    command = [sys.executable, "-m", "qwenvl.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)], ids=str)
def test_the_help_page_lists_every_command(arguments: tuple[str, ...]) -> None:
    done = qwenvl(*arguments)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_help_page_imports_no_library() -> None:
    code = (
        "import json, sys; from qwenvl.cli.main import main; main(['--help']); "
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_version_is_the_package_s() -> None:
    assert qwenvl("--version").stdout == f"qwenvl {__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("shwo", "show"), ("check_image", "check"), ("merge_lora", "merge")])
def test_an_unknown_command_is_told_the_nearest(typed: str, meant: str) -> None:
    done = qwenvl(typed, "--dataset_use", "mine")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"no command {typed!r}" in done.stderr and repr(meant) in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_near() -> None:
    assert qwenvl("xyz").stderr == "qwenvl: no command 'xyz'. qwenvl --help lists them.\n"


@pytest.mark.parametrize("name", ["show", "demo-data", "train"])
def test_a_command_has_its_own_help_under_its_own_name(name: str) -> None:
    done = qwenvl(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: qwenvl {name} ")
    assert "  --" in done.stdout


def test_the_exit_code_is_that_of_the_command() -> None:
    done = qwenvl("show", "--modl", "x")
    assert done.returncode == 1
    assert "unknown flag --modl" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_is_made_through_the_command(tmp_path: Path) -> None:
    done = qwenvl("demo-data", "--output", str(tmp_path / "data"), "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "digits_train.jsonl").read_text().count("\n") == 2


def main_of(tool: Path) -> str:
    """Return the module that a file of tools/ takes ``main`` from."""
    tree = ast.parse(tool.read_text(encoding="utf-8"))
    (module,) = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["main"]
    ]
    assert module is not None
    return module


def test_every_tool_is_a_command_with_the_same_code() -> None:
    tools = {main_of(path) for path in (ROOT / "tools").glob("*.py")}
    assert tools == {command.module for command in COMMANDS.values() if command.module.startswith("qwenvl.cli.")}
    assert COMMANDS["train"].module == train.__module__


def test_the_page_on_installation_names_the_file_of_every_command() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `qwenvl ([a-z-]+)` \| `(\S+\.py)` \|", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(COMMANDS)
    for name, file in rows:
        module = main_of(ROOT / file) if file.startswith("tools/") else file.removesuffix(".py").replace("/", ".")
        assert module == COMMANDS[name].module
