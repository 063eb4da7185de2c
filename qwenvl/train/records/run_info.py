"""Facts about a run for both model card and report: its command, data and versions."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from qwenvl import __version__
from qwenvl.config import without_secrets
from qwenvl.train.build.data import RunData

VERSIONS_FILE, DATA_FILE = "versions.json", "data.json"

_PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "deepspeed", "safetensors", "tokenizers")


@dataclass(frozen=True)
class UsedRows:
    """Rows of a dataset that a run uses.

    Args:
        dataset: Name of the dataset.
        use: Use of the rows: ``training`` or ``evaluation``.
        rows: Number of used rows; a repeated row counts each time.
        available: Number of rows in its annotations.
        samples: Number of samples in the used rows without skipped ones; None if they were not counted.
        fingerprint: Hash of the content of its annotations.
    """

    dataset: str
    use: str
    rows: int
    available: int
    samples: int | None = None
    fingerprint: str = ""


def used_rows(data: RunData) -> list[UsedRows]:
    """Return the used rows of each dataset, first for training, then for evaluation."""
    held_out = data.evaluation.tables if data.evaluation is not None else []
    measures, first = data.arranged.measures, 0
    found = []
    for use, tables in (("training", data.train.tables), ("evaluation", held_out)):
        for one in tables:
            rows = UsedRows(one.table.spec.name, use, len(one.rows), len(one.table), None, one.table.fingerprint)
            if use == "training" and measures is not None:
                rows = replace(rows, samples=int(measures["samples"][first : first + len(one.rows)].sum()))
                first += len(one.rows)
            found.append(rows)
    return found


def rerun_command(given: Mapping[str, Any]) -> str:
    """Return the command line of the given settings, without secrets."""
    words = ["torchrun qwenvl/train/train_qwen.py"]
    for name, value in without_secrets(given).items():
        words.append(f"--{name} {shlex.quote(setting_text(value))}")
    return " \\\n    ".join(words)


def setting_text(value: Any) -> str:
    """Return the value of a setting in command line form."""
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def find_versions() -> dict[str, str]:
    """Return the versions of this package, Python, and the installed packages that affect results."""
    versions = {"qwenvl": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
