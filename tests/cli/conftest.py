"""Fixtures of the tests of the tool that checks data."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl.cli.check_image.command import main
from tests.cli.checking import Check, write_media


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked") / "media"
    write_media(folder)
    return folder


@pytest.fixture
def check(tmp_path: Path, media: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Function of flags that returns the exit code, the output and the messages; its files are in tmp_path/out."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, file: str = "set.jsonl", workers: int = 0) -> tuple[int, str, str]:
        entry = {"annotation_path": str(tmp_path / file), "data_path": str(media)}
        (tmp_path / "registry.py").write_text(f"data_dict = {{'set': {entry!r}}}")
        fixed = ["--dataset_registry", str(tmp_path / "registry.py"), "--output", str(tmp_path / "out")]
        code = main([*fixed, "--workers", str(workers), *(flags or ("--dataset_use", "set"))])
        return code, *capsys.readouterr()

    return run
