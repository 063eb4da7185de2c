"""What a manifest notices of a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from qwenvl.train.checkpoint import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files on two levels, and its manifest."""
    for name, content in (("b.txt", b"second"), ("a.bin", bytes(range(256))), ("deep/er/c.txt", b"third"), ("d", b"")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest.write(tmp_path)
    return tmp_path


def test_every_file_is_listed_with_its_size_and_hash(folder: Path) -> None:
    manifest.write(folder)  # it does not list itself
    files = json.loads((folder / manifest.NAME).read_text())["files"]
    assert list(files) == ["a.bin", "b.txt", "d", "deep/er/c.txt"]
    lengths = {len(entry["blake2b"]) // 2 for entry in files.values()}
    assert len(lengths) == 1
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        digest = hashlib.blake2b(content, digest_size=lengths.copy().pop()).hexdigest()
        assert entry == {"bytes": len(content), "blake2b": digest}
    assert manifest.problem_of(folder) is None
    assert len((folder / manifest.NAME).read_text().splitlines()) > len(files), "people read it too"


def test_a_large_file_is_hashed_to_its_end(tmp_path: Path) -> None:
    """It is read in parts of 16 MB."""
    content = bytearray((1 << 24) + 5)
    (tmp_path / "large").write_bytes(content)
    manifest.write(tmp_path)
    content[-1] = 1
    (tmp_path / "large").write_bytes(content)
    problem = manifest.problem_of(tmp_path)
    assert problem is not None and "large is not as it was saved" in problem


def test_a_folder_without_one_and_added_files_are_no_problem(folder: Path) -> None:
    (folder / "new").write_text("x")
    assert manifest.problem_of(folder) is None
    (folder / manifest.NAME).unlink()
    (folder / "a.bin").unlink()
    assert manifest.problem_of(folder) is None


def test_what_changed_is_named(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"SECOND")
    problem = manifest.problem_of(folder)
    assert problem is not None and problem.startswith("b.txt is not as it was saved") and manifest.NAME in problem
    (folder / "deep/er/c.txt").write_bytes(b"third and more")
    assert manifest.problem_of(folder) == "deep/er/c.txt has 14 bytes, and 5 were saved"
    (folder / "a.bin").unlink()
    assert manifest.problem_of(folder) == "a.bin is missing"
    (folder / "a.bin").mkdir()
    assert manifest.problem_of(folder) == "a.bin is missing"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'"files"', b"\xff"])
def test_one_that_cannot_be_read_is_a_problem(content: bytes, folder: Path) -> None:
    (folder / manifest.NAME).write_bytes(content)
    problem = manifest.problem_of(folder)
    assert problem is not None and problem.startswith(f"{manifest.NAME} cannot be read (")
