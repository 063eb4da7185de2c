"""A video that is never read: the wait ends, the sample is named, and nothing hangs, not even the process's end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.video.backend import Shrink, VideoHeader
from qwenvl.data.media.video.decode import PyAvBackend, TorchcodecBackend
from qwenvl.data.types import VideoItem
from qwenvl.utils.deadline import call_within
from qwenvl.utils.errors import SampleError
from tests.data.images import reason_of

REPOSITORY = Path(__file__).resolve().parents[3]


class Sleeping:
    """A video backend that waits before it answers."""

    name = "sleeping"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def header(self, source: str | bytes) -> VideoHeader:
        time.sleep(self.seconds)
        return VideoHeader(8, 2.0, 4, 6)

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.zeros(len(indices), 3, 4, 6, dtype=torch.uint8)


def test_a_video_that_is_never_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setattr("qwenvl.data.media.reader.choose_backend", lambda: Sleeping(60))
    reader, item = MediaReader(str(tmp_path), video_timeout=0.05), VideoItem("a.mp4")
    for call in (lambda: reader.video_header(item), lambda: reader.read_frames(item, np.array([0]))):
        reason = reason_of(call, "timeout")
        assert reason.startswith(f"{tmp_path}/a.mp4: ") and "0.05 s (--video_timeout)" in reason


def test_a_video_that_is_read_in_time_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setattr("qwenvl.data.media.reader.choose_backend", lambda: Sleeping(0.01))
    reader, item = MediaReader(str(tmp_path), video_timeout=60), VideoItem("a.mp4")
    assert reader.video_header(item) == VideoHeader(8, 2.0, 4, 6)
    assert reader.read_frames(item, np.array([0, 1])).shape == (2, 3, 4, 6)


def test_errors_come_through() -> None:
    def fail() -> None:
        raise SampleError("unreadable_file", "broken")

    with pytest.raises(SampleError, match="broken"):
        call_within(60, fail)


@pytest.mark.parametrize("backend", [TorchcodecBackend, PyAvBackend])
def test_the_decoders_can_be_left_waiting(tmp_path: Path, backend: type[TorchcodecBackend] | type[PyAvBackend]) -> None:
    """For a file whose content never comes. The interpreter goes on meanwhile, and ends without them."""
    try:
        backend()
    except ImportError as error:
        pytest.skip(str(error))
    os.mkfifo(tmp_path / "endless")
    code = (
        f"from qwenvl.data.media.video.decode import {backend.__name__} as Backend\n"
        "from qwenvl.utils.deadline import call_within\n"
        "backend = Backend()\n"
        "try:\n"
        f"    call_within(0.3, lambda: backend.header({str(tmp_path / 'endless')!r}))\n"
        "except TimeoutError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (0, "no answer within 0.3 s\n"), done.stderr
