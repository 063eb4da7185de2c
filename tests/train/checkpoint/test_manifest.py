"""What a manifest notices of a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
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


LARGE = 150 << 20
"""Bytes of a large file: two whole blocks and a part of a third."""


def written(file: Path, *changes: tuple[int, bytes]) -> Path:
    """Write a large file of zeros, which takes no room on disk, with these bytes at these places."""
    with file.open("wb") as content:
        content.truncate(LARGE)
        for place, data in changes:
            content.seek(place)
            content.write(data)
    return file


def entry_of(folder: Path, name: str = "large") -> dict[str, object]:
    return dict(json.loads((folder / manifest.NAME).read_text())["files"][name])


UNSAMPLED = (1 << 20) + 1000
"""A byte between the first two pieces of a large file that are sampled."""


@pytest.mark.parametrize("place", [0, LARGE - 1, round((LARGE - (1 << 20)) / 63)])
def test_a_large_file_is_sampled_from_its_first_byte_to_its_last(place: int, tmp_path: Path) -> None:
    written(tmp_path / "large")
    manifest.write(tmp_path)
    assert set(entry_of(tmp_path)) == {"bytes", "sample"}, "a checkpoint is published without reading all of it"
    assert manifest.problem_of(tmp_path) is None
    written(tmp_path / "large", (place, b"x"))
    assert "large is not as it was saved" in str(manifest.problem_of(tmp_path))
    written(tmp_path / "large", (UNSAMPLED, b"x"))
    assert manifest.problem_of(tmp_path) is None, "what the sample does not see"


def test_every_byte_counts_once_blocks_are_hashed(tmp_path: Path) -> None:
    written(tmp_path / "large", (5, b"content"))
    (tmp_path / "small").write_bytes(b"x")
    manifest.write(tmp_path)
    before = entry_of(tmp_path)
    manifest.add_blocks(tmp_path)
    assert entry_of(tmp_path).items() > before.items()
    assert set(entry_of(tmp_path, "small")) == {"bytes", "blake2b"}
    assert manifest.problem_of(tmp_path) is None
    written(tmp_path / "large", (5, b"content"), (UNSAMPLED, b"x"))
    assert "large is not as it was saved" in str(manifest.problem_of(tmp_path))
    assert manifest.problem_of(tmp_path, every_byte=False) is None
    written(tmp_path / "large", (LARGE - 1, b"x"))
    assert "large is not as it was saved" in str(manifest.problem_of(tmp_path, every_byte=False))
    content = (tmp_path / "large").read_bytes()
    size = len(str(before["sample"])) // 2
    blocks = [content[start : start + (1 << 26)] for start in range(0, LARGE, 1 << 26)]
    hashes = b"".join(hashlib.blake2b(block, digest_size=size).digest() for block in blocks)
    manifest.add_blocks(tmp_path)
    assert entry_of(tmp_path)["blocks"] == hashlib.blake2b(hashes, digest_size=size).hexdigest()


def test_manifests_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have a hash of every large file as a whole, which is the only thing to compare with."""
    content = written(tmp_path / "large").read_bytes()
    digest = manifest.new_hash()
    digest.update(content)
    entry = {"bytes": LARGE, "blake2b": digest.hexdigest()}
    (tmp_path / manifest.NAME).write_text(json.dumps({"files": {"large": entry}}))
    assert manifest.problem_of(tmp_path) is None
    written(tmp_path / "large", (UNSAMPLED, b"x"))
    for every_byte in (True, False):
        assert "large is not as it was saved" in str(manifest.problem_of(tmp_path, every_byte=every_byte))


def test_hashing_goes_on_behind_and_outlives_removed_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [tmp_path / name for name in ("one", "gone", "broken", "last")]
    for folder in folders:
        folder.mkdir()
        written(folder / "large")
        manifest.write(folder)
    (tmp_path / "broken" / manifest.NAME).write_text("{")
    shutil.rmtree(tmp_path / "gone")
    hasher = manifest.BackgroundHasher()
    for folder in folders:
        hasher.add(folder)
    hasher.finish()
    assert "blocks" in entry_of(tmp_path / "one") and "blocks" in entry_of(tmp_path / "last")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path / 'broken'}/manifest.json keeps the hashes of samples alone" in caplog.text
    manifest.BackgroundHasher().finish()  # nothing to wait for
