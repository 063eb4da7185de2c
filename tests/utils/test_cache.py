"""What is cached is found again under equal content only, and never seen half written."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl.utils.cache import cache_folder, fingerprint, replacing


def test_fingerprints_tell_parts_apart() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    different = [("ab",), ("a", "b"), (["a", "b"],), ("a", None), (1,), ("1",), (1.5,), (True,)]
    assert len({fingerprint(*parts) for parts in different}) == len(different)
    assert fingerprint("\ud800")  # a lone surrogate out of a JSON file


def test_the_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QWENVL_CACHE", "/a")
    assert cache_folder(str(tmp_path)) == tmp_path
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("QWENVL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/qwenvl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "qwenvl"


def test_a_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(TypeError), replacing(path) as temporary:
        temporary.write_text(2)  # type: ignore[arg-type]
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def no_links(path: Path, target: Path) -> None:
    raise PermissionError(f"this file system has no hard links: {path} to {target}")


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_a_file_that_is_there_can_be_kept(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    path = tmp_path / "file"
    for text in ("one", "two"):
        with replacing(path, keep=True) as temporary:
            temporary.write_text(text)
    assert path.read_text() == ("one" if links else "two")
    assert list(tmp_path.iterdir()) == [path]
