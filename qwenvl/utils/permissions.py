"""Set permissions of saved files by the umask, also where a library writes files for their owner only."""

from __future__ import annotations

import stat
import uuid
from pathlib import Path


def follow_umask(folder: Path) -> None:
    """Give every file below a folder at least the permissions that a new file gets there.

    safetensors writes with mode 0600, whatever the umask: on a shared disk, nobody else could open such a model.

    Args:
        folder: Folder that this process has written.
    """
    wanted = _mode_of_new_files(folder)
    for file in folder.rglob("*"):
        mode = stat.S_IMODE(file.lstat().st_mode)
        if file.is_file() and not file.is_symlink() and wanted & ~mode:
            file.chmod(mode | wanted)


def _mode_of_new_files(folder: Path) -> int:
    """Return the mode of a new file in a folder, by making one: reading the umask would change it for all threads."""
    probe = folder / f".mode.{uuid.uuid4().hex}"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
