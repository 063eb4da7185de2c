"""The help pages of the commands: the flags that a command reads, and no others."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenvl.cli.main import COMMANDS
from qwenvl.config.parsing.command_line import HelpPage

QWENVL = Path(__file__).resolve().parents[2] / "qwenvl"
SHARED = ("cli/data_args.py", "cli/inference_args.py", "data/encoding/processor.py", "data/media/resize.py")
"""Files in which the commands share the reading of flags."""


def pages() -> Iterator[tuple[str, str, HelpPage]]:
    for name, command in COMMANDS.items():
        page = getattr(importlib.import_module(command.module), "PAGE", None)
        if isinstance(page, HelpPage):
            yield name, command.module, page


PAGES = {name: (module, page) for name, module, page in pages()}


def attributes(module: str) -> set[str]:
    """Return the names of all attributes that the files of a command and the shared ones read."""
    path = QWENVL.parent / Path(*module.split("."))
    own = [path.with_suffix(".py")] if path.parent == QWENVL / "cli" else sorted(path.parent.glob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (*own, *(QWENVL / name for name in SHARED))]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("command", PAGES)
def test_every_flag_of_a_help_page_is_read(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, page = PAGES[command]
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert shown and not page.unread & set(shown)
    if command == "advise":  # puts all data flags into the commands that it prints
        return
    assert not set(shown) - attributes(module), "flags that nothing reads: name them in the unread of its PAGE"


@pytest.mark.parametrize("command", [name for name, (_, page) in PAGES.items() if page.unread])
def test_a_flag_without_effect_is_refused_with_the_reason(command: str, caplog: pytest.LogCaptureFixture) -> None:
    module, page = PAGES[command]
    words = [text for name in sorted(page.unread) for text in (f"--{name}", "1")]
    assert importlib.import_module(module).main(words) != 0
    flags = ", ".join(f"--{name}" for name in sorted(page.unread))
    assert f"{flags}: no effect here, as this command does not read such settings" in caplog.text
