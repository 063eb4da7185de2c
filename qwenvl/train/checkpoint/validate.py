"""Validate a folder right after it was saved, rather than when it is served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl.models.moe_checkpoint import weight_files
from qwenvl.train.checkpoint.folder_check import Header, problems_of, read_headers
from qwenvl.utils.errors import UserError

BLAME = (
    "The folder was kept, but do not use it before the cause is known. versions.json says which transformers saved it: "
    "try another version, or report it."
)
"""Advice about a folder with problems, for messages."""


def read_source(model_name_or_path: str, **origin: Any) -> dict[str, Header]:
    """Return the tensors of the checkpoint that training starts from, from the headers of its files."""
    return read_headers([Path(file) for file in weight_files(model_name_or_path, origin)])


def require_whole(folder: str, source: Mapping[str, Header] | None) -> None:
    """Check that a saved folder is self-contained; only small files and headers are read.

    Args:
        folder: Saved folder.
        source: Result of :func:`read_source`; None if not known.

    Raises:
        UserError: Something is missing or wrong.
    """
    problems = problems_of(Path(folder), source)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{folder} was saved, but is not complete:{lines}\n{BLAME}")
