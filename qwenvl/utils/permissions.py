"""Who may read what is saved: as the umask says, also where a library writes files for their owner alone."""

from __future__ import annotations

import stat
import uuid
from pathlib import Path


def follow_umask(folder: Path) -> None:
    """Give every file below a folder at least the permissions that a new file gets there.

    safetensors writes with mode 0600, whatever the umask: on a shared disk, nobody else could open such a model.

    Args:
        folder: A folder that this process has written.
    """
    wanted = _mode_of_new_files(folder)
    for file in folder.rglob("*"):
        mode = stat.S_IMODE(file.lstat().st_mode)
        if file.is_file() and not file.is_symlink() and wanted & ~mode:
            file.chmod(mode | wanted)


def _mode_of_new_files(folder: Path) -> int:
    """Ask the file system: reading the umask would change it for a moment, for all threads."""
    probe = folder / f".mode.{uuid.uuid4().hex}"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
