"""Whether a folder that was saved holds all that it needs, said when it is saved rather than when it is served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl.models.moe_checkpoint import weight_files
from qwenvl.train.checkpoint.folder_check import Header, problems_of, read_headers
from qwenvl.utils.errors import UserError

BLAME = (
    "The folder is there and nothing of it was removed, but do not use it before you know why. versions.json says "
    "which transformers saved it: try another one, or report it."
)
"""What there is to do about a folder that is not as it should be."""


def read_source(model_name_or_path: str, **origin: Any) -> dict[str, Header]:
    """Return the tensors of the checkpoint that training starts from, from the headers of its files."""
    return read_headers([Path(file) for file in weight_files(model_name_or_path, origin)])


def require_whole(folder: str, source: Mapping[str, Header] | None) -> None:
    """Check that a saved folder holds all that it needs to be used alone; only small files and headers are read.

    Args:
        folder: that was saved.
        source: from :func:`read_source`.

    Raises:
        UserError: it does not.
    """
    problems = problems_of(Path(folder), source)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{folder} was saved, but is not whole:{lines}\n{BLAME}")
