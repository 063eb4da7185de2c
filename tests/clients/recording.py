"""Records tests of clients in docs/compatibility.md: hooks that ``conftest.py`` gives to pytest.

A test, its module or its parameter says what its row reads if it passes::

    @pytest.mark.client("vLLM", family="qwen3_vl", kind="LoRA with YaRN", arguments="--hf-overrides")

Marks nearer to the test win; a parameter named ``family`` is the row's. Nothing is written unless CLIENTS_RECORD names
the folder of page and data, as ``scripts/test.sh --clients`` does. A skipped test leaves its row as it was.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scripts.compatibility_page import FAMILIES, Row, record

ROW = pytest.StashKey[Row]()
FAILED = "**FAILED**"
UNFINISHED = "**did not finish**"


class Client(NamedTuple):
    """A program with an environment of its own, or one in the tests' own environment.

    Args:
        variable: Environment variable that names its environment; None for the tests' own.
        packages: Its package, and those that it stands on, whose versions are told too.
    """

    variable: str | None
    packages: tuple[str, ...]


CLIENTS = {
    "vLLM": Client("CLIENTS_VLLM", ("vllm", "transformers")),
    "transformers": Client("CLIENTS_TRANSFORMERS4", ("transformers", "torch")),
    "mlx-vlm": Client("CLIENTS_MLX_VLM", ("mlx-vlm", "mlx")),
    "lmms-eval": Client("CLIENTS_LMMS_EVAL", ("lmms-eval", "transformers")),
    "llama.cpp of xllamacpp": Client("CLIENTS_LLAMA_CPP", ("xllamacpp",)),
}
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"


def version_of(client: Client) -> str:
    """Ask the installed program for its version; return it with those of the libraries below."""
    python = Path(os.environ[client.variable], "bin", "python") if client.variable else sys.executable
    done = subprocess.run([python, "-c", VERSIONS, *client.packages], capture_output=True, text=True)
    if done.returncode != 0:
        return "of unknown version"
    own, *below = done.stdout.split()
    others = [" ".join(pair) for pair in zip(client.packages[1:], below, strict=True)]
    return f"{own} ({', '.join(others)})" if others else own


def row_of(item: pytest.Function) -> Row | None:
    """Return what the marks of a test say; None for a test without.

    Raises:
        UsageError: they do not make a row.
    """
    marks = [mark for node in item.listchain() for mark in node.own_markers if mark.name == "client"]
    if not marks:
        return None
    callspec = getattr(item, "callspec", None)
    found: dict[str, Any] = {"family": callspec.params.get("family")} if callspec else {}
    for mark in marks:
        found |= ({"client": mark.args[0]} if mark.args else {}) | mark.kwargs
    if found.get("client") not in CLIENTS or found.get("family") not in FAMILIES or not found.get("kind"):
        raise pytest.UsageError(f"{item.nodeid}: its marks 'client' make no row of a known client and family: {found}")
    return Row(**found)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the row of a test, so that a mistake in its marks is found before anything runs."""
    row = row_of(item) if isinstance(item, pytest.Function) else None
    if row is not None:
        item.stash[ROW] = row


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write the row of a test that passed or failed."""
    report = yield
    folder, row = os.environ.get("CLIENTS_RECORD"), item.stash.get(ROW, None)
    result = result_of(report, row.result) if row else None
    if folder and row and result:
        version, today = version_of(CLIENTS[row.client]), datetime.date.today().isoformat()
        record(item.nodeid, replace(row, result=result, version=version, date=today), Path(folder))
    return report


def result_of(report: pytest.TestReport, passed: str) -> str | None:
    """Return the result after a phase of a test, None to leave the row as it was.

    Before the test itself runs, its row says that it did not finish: nothing is left to say so once a time limit or
    the lack of memory has ended the process.
    """
    if report.failed or hasattr(report, "wasxfail"):
        return FAILED
    if report.skipped or report.when == "teardown":
        return None
    return UNFINISHED if report.when == "setup" else passed
