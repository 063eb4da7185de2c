"""Versions and Python of the environments that scripts/environment.sh makes; nothing is installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]


def call(function: str, **environment: str) -> list[str]:
    command = ["bash", "-c", f"source '{REPOSITORY}/scripts/environment.sh'; {function}"]
    printed = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
    return printed.splitlines()


def test_the_oldest_versions_are_the_lower_bounds_of_every_requirement() -> None:
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    declared = [Requirement(line) for line in lines if line and not line.startswith("#")]
    oldest = [Requirement(line) for line in call("oldest_versions")]
    assert len(declared) > 20
    for wide, exact in zip(declared, oldest, strict=True):
        lower = [one.version for one in wide.specifier if one.operator == ">="]
        assert (exact.name, str(exact.marker)) == (wide.name, str(wide.marker))
        assert [(one.operator, one.version) for one in exact.specifier] == [("==", *lower)]


@pytest.mark.parametrize(("kind", "chosen"), [("oldest", "python3.11"), ("newest", "python3.12"), ("dev", "python3")])
def test_the_python_is_the_oldest_or_the_newest_that_runs(kind: str, chosen: str, tmp_path: Path) -> None:
    for name, runs in {"3.10": False, "3.11": True, "3.12": True, "3.13": False, "3": True}.items():
        python = tmp_path / f"python{name}"
        python.write_text(f"#!/bin/sh\n{'echo $0' if runs else 'exit 127'}\n")
        python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert call(f"_find_python {kind}", PATH=path, PYTHON="") == [str(tmp_path / chosen)]


def test_the_core_that_every_version_passes_exists() -> None:
    named = (REPOSITORY / "tests" / "core.txt").read_text(encoding="utf-8").split()
    for name in named:
        path, _, test = name.partition("::")
        assert f"def {test}" in (REPOSITORY / path).read_text(encoding="utf-8"), name
