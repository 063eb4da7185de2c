"""Path of the repository that contains this package, unless it is installed from a wheel."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
CHECKOUT: Path | None = _ROOT if (_ROOT / "pyproject.toml").is_file() else None
"""Folder of the repository, with its ``configs/``, ``data/`` and ``requirements.txt``; None for an installed wheel."""
