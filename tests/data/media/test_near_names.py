"""A path that leads to no file: the message names the file that was probably meant."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from qwenvl.data.media import near_names
from qwenvl.data.media.locate import MediaSources
from tests.data.images import reason_of

CAFE = unicodedata.normalize("NFC", "café.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    media = tmp_path / "media"
    (media / "Images").mkdir(parents=True)
    for name in (
        "Images/a.jpg",
        "Images/b.gif",
        f"Images/{CAFE}",
        "Images/with space.png",
        "Images/notes.txt",
        "c.jpg",
    ):
        (media / name).write_bytes(b"0")
    (tmp_path / "secret.jpg").write_bytes(b"0")
    return media


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("Images/A.JPG", "'a.jpg' in {}/Images."),
        ("Images/a.jpeg", "'a.jpg' in {}/Images."),
        ("Images/b.jpg", "'b.gif' in {}/Images."),
        ("Images/a.jpg ", "'a.jpg' in {}/Images."),
        (f"Images/{unicodedata.normalize('NFD', CAFE)}", f"{CAFE!r} (other Unicode characters that look the same) in"),
        ("images/a.jpg", "'Images' in {}."),
        ("Images/more/a.jpg", None),
        ("Images/notes.jpg", None),  # a text is no medium
        ("Images/none.jpg", None),
        ("Images\\a.jpg", "'Images/a.jpg' in {}."),
        ("C:\\data\\Images\\a.jpg", "'Images/a.jpg' in {}."),
        ("Images/with%20space.png", "'Images/with space.png' in {}."),
        ("media/Images/a.jpg", "'Images/a.jpg' in {}."),
        ("/data/local-files/?d=Images/a.jpg", "'Images/a.jpg' in {}."),
        ("/old/machine/media/Images/a.jpg", "'Images/a.jpg' in {}."),
        ("file:///old/machine/c.jpg", "'c.jpg' in {}."),
        ("../secret.jpeg", None),  # nothing is said of what lies outside
        ("../Media/c.jpg", None),
    ],
)
def test_the_file_that_was_meant(folder: Path, source: str, hint: str | None) -> None:
    outside = source.startswith(("/", "file:", "../"))
    category = "outside_data_path" if outside else "missing_file"
    reason = reason_of(lambda: MediaSources(str(folder)).locate(source), category)
    if hint is None:
        assert "There is" not in reason
    else:
        assert reason.partition(" There is ")[2].startswith(hint.format(folder))


def test_a_file_that_is_empty_or_a_folder_gets_no_hint(folder: Path) -> None:
    (folder / "e.jpg").touch()
    (folder / "e.png").write_bytes(b"0")
    assert "There is" not in reason_of(lambda: MediaSources(str(folder)).locate("e.jpg"), "zero_byte")


def test_without_data_path_paths_start_from_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    sources = MediaSources("")
    assert reason_of(lambda: sources.locate("Images/A.jpg"), "missing_file").endswith(" There is 'a.jpg' in Images.")
    assert reason_of(lambda: sources.locate("images/a.jpg"), "missing_file").endswith(" There is 'Images' in ..")
    assert reason_of(lambda: sources.locate("/none/c.jpg"), "missing_file").endswith("'c.jpg' in the working folder.")


def test_a_folder_is_listed_once_and_again_when_it_has_changed(folder: Path) -> None:
    path = str(folder / "Images")
    near_names._listed.cache_clear()
    for number in range(50):
        assert near_names.beside(f"{path}/none{number}.jpg") == ""
    assert near_names._listed.cache_info().misses == 1
    (folder / "Images" / "none7.png").write_bytes(b"0")
    os.utime(path, ns=(0, 1))
    assert near_names.beside(f"{path}/none7.jpg") == f" There is 'none7.png' in {path}."
    assert near_names._listed.cache_info().misses == 2


def test_of_a_huge_folder_a_part_is_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_names, "MOST_LISTED", 2)
    near_names._listed.cache_clear()
    near_names.beside(str(folder / "Images" / "none.jpg"))
    path = str(folder / "Images")
    assert len([key for key in near_names._listed(path, os.stat(path).st_mtime_ns) if not key.endswith("/")]) == 2
    near_names._listed.cache_clear()
