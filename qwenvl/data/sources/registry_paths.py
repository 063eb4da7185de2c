"""Find the files and folders of a registry entry; each file is used once."""

from __future__ import annotations

import glob
import logging
import os
import re
from pathlib import Path
from typing import Any

from qwenvl.utils.errors import UserError

_PATTERN = re.compile(r"[*?[]")

logger = logging.getLogger(__name__)


def annotation_paths(value: Any, base: Path, where: str) -> tuple[str, ...]:
    """Return the annotation files of an entry, in the order in which they are first named, each once.

    Args:
        value: Value of ``annotation_path``: a file, a pattern, or a list of these.
        base: Folder that relative paths start from.
        where: Name of the entry, for messages.

    Raises:
        UserError: a file does not exist, or a pattern finds none.
    """
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, str | Path) and str(item) for item in items):
        raise UserError(f"{where}: 'annotation_path' must be a file or a list of files, not {value!r}.")
    files = [path for item in items for path in _files(item, base, where)]
    real = [os.path.realpath(path) for path in files]
    first = {path: real.index(path) for path in real}
    repeated = [files[place] for place, path in enumerate(real) if first[path] != place]
    if repeated:
        logger.warning(
            "%s: 'annotation_path' names %s more than once. It is used once; NAME%%200 uses a dataset twice.",
            where,
            ", ".join(sorted(set(repeated))),
        )
    return tuple(files[place] for place in first.values())


def data_folder(value: Any, base: Path, where: str) -> str:
    """Return the folder of an entry's media; empty where it has none.

    Args:
        value: Value of ``data_path``.
        base: Folder that relative paths start from.
        where: Name of the entry, for messages.

    Raises:
        UserError: the folder does not exist.
    """
    if not isinstance(value, str | Path):
        raise UserError(f"{where}: 'data_path' must be a folder, or \"\"; not {value!r}.")
    if value == "":
        return ""
    path = base / Path(value).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{where}: the folder of its media, {path}, does not exist.{_relative_hint(value, base)} "
            'Write "data_path": "" where the annotations hold absolute paths or no media.'
        )
    return str(path)


def _files(item: str | Path, base: Path, where: str) -> list[str]:
    path = base / Path(item).expanduser()
    if path.is_file():
        return [str(path)]
    if _PATTERN.search(str(item)):
        return _matches(item, base, where)
    problem = "is a folder, not a file" if path.is_dir() else "does not exist"
    raise UserError(f"{where}: annotation file {path} {problem}.{_relative_hint(item, base)}")


def _matches(pattern: str | Path, base: Path, where: str) -> list[str]:
    names = glob.glob(os.path.expanduser(pattern), root_dir=base, recursive=True)
    found = sorted(str(base / name) for name in names if (base / name).is_file())
    if not found:
        raise UserError(f"{where}: no annotation file matches {str(pattern)!r}.{_relative_hint(pattern, base)}")
    return found


def _relative_hint(value: str | Path, base: Path) -> str:
    return "" if Path(value).expanduser().is_absolute() else f" (Relative paths start from {base}.)"
