"""The flags no run does without, and what the tests parse beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenvl.config import ParsedArguments, parse_arguments
from qwenvl.utils.errors import UserError

NEEDED = ("--model_name_or_path", "m", "--dataset_use", "a", "--output_dir", "out", "--tune_mm_llm")


def parsed(*flags: str) -> ParsedArguments:
    return parse_arguments([*NEEDED, *flags])


def recipe(folder: Path, **values: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def rejected(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        parsed(*flags)
    return str(caught.value)
