"""Runs tests on a changed module, each time in a fork of a process that has the heavy libraries in memory.

A process of its own for every change would spend 5 to 10 s on imports. Nothing of the repository is imported here, only
what it needs: the fork imports the tests and the package, and gets the changed code for the one module. Processes that
the tests start anew (not by forking) run the code as it is.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "not slow and not long"
PROFILE = "mutation"  # of hypothesis; pytest's option for it wins over what tests/conftest.py loads
MEMORY = 8 << 30  # bytes of a fork: a loop that never ends must not take the machine with it
PASSED, NOTHING_RAN = 0, 5  # https://docs.pytest.org/en/stable/reference/exit-codes.html


@dataclass(frozen=True)
class Baseline:
    """What tests do with a module as it is.

    Attributes:
        seconds: time of each test that passed, by its id.
        lines: lines of the module that each of them runs.
        everywhere: lines that run at imports and in fixtures, so on behalf of any test.
        failed: ids of tests that fail without a change.
        modules: names of the libraries' modules that were imported.
    """

    seconds: dict[str, float]
    lines: dict[str, list[int]]
    everywhere: list[int]
    failed: list[str]
    modules: list[str]

    def reaching(self, lines: Sequence[int]) -> list[str]:
        """Return the tests that run any of the lines, the quickest first."""
        wanted = set(lines)
        anyone = not wanted.isdisjoint(self.everywhere)
        tests = [name for name in self.seconds if anyone or not wanted.isdisjoint(self.lines[name])]
        return sorted(tests, key=lambda name: self.seconds[name])


def measure(path: Path, tests: Sequence[str]) -> Baseline:
    """Run the test files once, and bring the libraries they use into this process.

    Raises:
        SystemExit: a test file cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        result = Path(folder) / "baseline.json"
        code = compile(ast.parse(path.read_text(encoding="utf-8")), str(path), "exec")
        status = _forked(lambda: _run(path, code, tests, [_Recorder(path, result)]), seconds=1800)
        if status not in (0, 1) or not result.is_file():
            raise SystemExit(f"error: {' '.join(tests)} did not run (status {status}); run them with pytest first.")
        baseline = Baseline(**json.loads(result.read_text(encoding="utf-8")))
    for name in baseline.modules:
        with suppress(Exception):  # names made at run time; whatever is missing here the fork imports itself
            importlib.import_module(name)
    return baseline


def notices(path: Path, code: CodeType, tests: Sequence[str], chosen: Sequence[str], seconds: float) -> bool:
    """Return whether a test fails, or does not end, with other code for a module.

    Args:
        path: the module's file.
        code: its changed code.
        tests: files with tests.
        chosen: ids of the tests to run, in this order.
        seconds: time after which the change counts as noticed.
    """
    return _forked(lambda: _run(path, code, tests, [_Chosen(chosen)], "-x"), seconds) not in (PASSED, NOTHING_RAN)


def prepare(cache: Path) -> None:
    """Set what ``tests/conftest.py`` sets, before the libraries are imported here.

    Args:
        cache: empty folder for what libraries keep.
    """
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    # No search for the smallest example that fails, which takes longer than all else.
    settings.register_profile(
        PROFILE,
        phases=(Phase.explicit, Phase.generate),
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def _run(path: Path, code: CodeType, tests: Sequence[str], plugins: list[object], *options: str) -> int:
    sys.meta_path.insert(0, _Changed(path, code))
    common = ["-p", "no:cacheprovider", "-m", MARKERS, f"--hypothesis-profile={PROFILE}"]
    return int(pytest.main([*common, *options, *tests], plugins=plugins))


def _forked(work: Callable[[], int], seconds: float) -> int:
    """Return the exit status of the work in a fork; -9 if it is stopped after the time."""
    folder = tempfile.mkdtemp(prefix="mutation-")

    def child() -> None:
        os.setsid()
        log = os.open(os.path.join(folder, "log"), os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        status = 3
        try:
            status = work()
        finally:
            os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    with suppress(ProcessLookupError):  # also what the tests started
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    shutil.rmtree(folder, ignore_errors=True)
    return process.exitcode or 0


class _Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Gives a module's changed code to whoever imports it."""

    def __init__(self, path: Path, code: CodeType) -> None:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        importlib.machinery.SourceFileLoader.__init__(self, name, str(path))
        self._code = code

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class _Chosen:
    """Has pytest run these tests, in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._order = {name: place for place, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self._order), key=lambda i: self._order[i.nodeid])


class _Recorder:
    """Writes down which lines of a file each test runs, in forked processes and threads too."""

    def __init__(self, path: Path, result: Path) -> None:
        self._path, self._result = str(path), result
        self._hits = mmap.mmap(-1, len(path.read_text(encoding="utf-8").splitlines()) + 2)  # shared with forks
        self._everywhere: set[int] = set()
        self._lines: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._failed: list[str] = []
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != self._path:
            return None
        self._hits[frame.f_lineno] = 1
        return self._trace

    def _take(self) -> list[int]:
        taken = [number for number, hit in enumerate(self._hits[:]) if hit]
        self._hits[:] = bytes(len(self._hits))
        return taken

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._everywhere.update(self._take())
        started = time.perf_counter()
        try:
            return (yield)
        finally:
            self._seconds[item.nodeid] = time.perf_counter() - started
            self._lines[item.nodeid] = self._take()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        sys.settrace(None)
        self._everywhere.update(self._take())
        for name in self._failed:
            self._seconds.pop(name, None)
        libraries = [name for name, module in list(sys.modules.items()) if _is_library(module)]
        facts = [self._seconds, self._lines, sorted(self._everywhere), self._failed, libraries]
        names = ("seconds", "lines", "everywhere", "failed", "modules")
        self._result.write_text(json.dumps(dict(zip(names, facts, strict=True))), encoding="utf-8")


def _is_library(module: ModuleType) -> bool:
    """Return whether a module is no part of the repository."""
    file = getattr(module, "__file__", None)
    return bool(file) and ("site-packages" in str(file) or not Path(str(file)).is_relative_to(ROOT))
