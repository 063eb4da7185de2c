"""Manifest of a checkpoint's files, which detects truncated or changed files before training resumes from them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwenvl.utils.cache import new_hash

NAME = "manifest.json"

_CHUNK = 1 << 24
_THREADS = 8  # hashlib releases the GIL; a single thread hashes more slowly than disks read


def write(folder: Path) -> None:
    """Write the size in bytes and the BLAKE2b hash of every file in ``folder`` and its subfolders."""
    names = _names(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(_hash, [folder / name for name in names]))
    sizes = [(folder / name).stat().st_size for name in names]
    files = {
        name: {"bytes": size, "blake2b": content} for name, size, content in zip(names, sizes, hashes, strict=True)
    }
    (folder / NAME).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def problem_of(folder: Path) -> str | None:
    """Return the first difference between a folder and its manifest; None if there is none, or no manifest.

    Additional files are ignored.
    """
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{NAME} cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, and {expected['bytes']} were saved"
    with ThreadPoolExecutor(_THREADS) as pool:
        for (name, expected), found in zip(files.items(), pool.map(_hash, [folder / n for n in files]), strict=True):
            if found != expected["blake2b"]:
                return f"{name} is not as it was saved (if you changed it yourself, remove {NAME})"
    return None


def _names(folder: Path) -> list[str]:
    """Return every file below ``folder``, as a path relative to it with forward slashes."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != NAME]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _hash(path: Path) -> str:
    digest = new_hash()
    view = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(view):
            digest.update(view[:size])
    return digest.hexdigest()
