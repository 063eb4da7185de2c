"""Settings of torch's CUDA allocator, which its first allocation reads."""

from __future__ import annotations

import os

import pytest

from qwenvl.utils.allocator import use_expandable_segments


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "expandable_segments:True"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64"),
        ("PYTORCH_CUDA_ALLOC_CONF", None),
    ],
)
def test_segments_grow_unless_the_environment_says_something(
    name: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(one, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    use_expandable_segments()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
