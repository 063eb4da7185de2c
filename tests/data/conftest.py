"""Fixtures of the tests of data."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl.data.media.reader import MediaReader


@pytest.fixture
def reader(tmp_path: Path) -> MediaReader:
    """Return a reader of ``tmp_path/media``, which is made."""
    (tmp_path / "media").mkdir()
    return MediaReader(str(tmp_path / "media"))
