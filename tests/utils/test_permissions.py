"""Permissions of saved files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwenvl.utils.permissions import follow_umask


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_files_are_opened_as_far_as_the_umask_lets_and_never_closed(tmp_path: Path, umask: int) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    outside.chmod(0o600)
    folder = tmp_path / "model" / "inner"
    before = os.umask(umask)
    try:
        folder.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
        (folder / "run.sh").touch(0o755)
        (folder / "run.sh").chmod(0o755)
        (folder / "link").symlink_to(outside)
        follow_umask(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.iterdir() if not path.is_symlink()}
    assert modes == {"a.safetensors": 0o666 & ~umask, "run.sh": 0o755}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.parent.iterdir()) == ["inner"]
