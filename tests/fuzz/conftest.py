"""Fixtures of the tests of hostile input."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl.data.encoding.encoder import SampleEncoder
from tests.data.media.video.test_decode import make_video
from tests.e2e.conftest import fail, registry
from tests.fuzz.doors import Doors, open_run_encoder

__all__ = ["fail", "registry"]


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Callable[..., Path]) -> SampleEncoder:
    return open_run_encoder(tiny_checkpoint("qwen3_vl"))


@pytest.fixture
def doors(tmp_path: Path, encoder: SampleEncoder) -> Doors:
    """Return the doors to a folder with a good picture and a good video."""
    media = tmp_path / "media"
    media.mkdir()
    picture = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    (media / "good.png").write_bytes(stream.getvalue())
    make_video(media / "good.mp4", frames=6)
    return Doors(tmp_path, encoder)
