"""Videos for the tests: frames that get brighter one by one, in any container, at any times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

WIDTH, HEIGHT = 64, 48
UNEVEN = [*range(0, 2000, 100), 5900, 9900, 13900, 17900]
"""Milliseconds: 20 frames at 10 a second, then one each 4 seconds, as a recorded screen that stands still."""


def encode(path: Path, codec: str = "mpeg4", times: Sequence[int] = range(0, 2000, 100)) -> Path:
    """Write a video of frames at ``times`` (milliseconds), each 10 brighter than the one before."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": "6"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        unit = math.gcd(1000, *times)
        stream.codec_context.time_base = Fraction(unit, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), number * 10, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time // unit, Fraction(unit, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
