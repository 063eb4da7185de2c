#!/usr/bin/env python
"""Print docs/flags.md, from the help texts of the flags: ``python scripts/flags_page.py > docs/flags.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.config.parsing.fields import Setting
from qwenvl.config.parsing.parser import GROUPS, INHERITED, all_settings

HEAD = """# Flags

Every flag of `qwenvl/train/train_qwen.py` that this trainer adds or redefines, with its help text. The other fields
of `transformers.TrainingArguments` are on [their own page](training_arguments.md). A flag is also the key in a recipe.
Whole numbers may be expressions, such as `576*32*32`. `python scripts/flags_page.py` generates this page.
"""
MOST_CHOICES = 12
"""Most choices that are shown; longer lists come from the installed transformers and change with its version."""


def page() -> str:
    """Return the page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield HEAD
    settings = all_settings().values()
    groups = [(owner, title) for owner, title in GROUPS.items() if owner is not INHERITED]
    for number, (owner, title) in enumerate(groups):
        yield f"## {title.capitalize()}\n"
        yield "| flag | takes | default | |"
        yield "|---|---|---|---|"
        yield from (_row(setting) for setting in settings if setting.owner is owner)
        if number < len(groups) - 1:
            yield ""


def _row(setting: Setting) -> str:
    plain = setting.expected.replace(" (576*32*32 is one too)", "")
    takes = ", ".join(f"`{choice}`" for choice in setting.choices) or _cell(plain)
    if len(setting.choices) > MOST_CHOICES:
        takes = "a name that `--help` lists"
    return f"| `{setting.name}` | {takes} | {_default(setting.default)} | {_cell(setting.help)} |"


def _default(value: Any) -> str:
    return "" if value is None or value == "" else f"`{getattr(value, 'value', value)}`"


def _cell(text: str) -> str:
    """Return a text escaped for a cell of a Markdown table."""
    for character in ("\\", "|", "*", "<", "`"):
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
