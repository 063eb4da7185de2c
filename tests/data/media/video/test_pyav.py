"""Videos by PyAV: every container, the times of frames, and single frames, against PyAV's own reading in order."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from qwenvl.data.media.video.backend import VideoHeader
from qwenvl.data.media.video.pyav import PyAvBackend, read_header
from qwenvl.utils.errors import SampleError
from tests.data.clips import HEIGHT, UNEVEN, WIDTH, encode


def in_order(path: Path) -> tuple[list[float], torch.Tensor]:
    """Decode all frames one after the other: seconds after the first, and uint8 [n, 3, height, width]."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [float((frame.pts - frames[0].pts) * frame.time_base) for frame in frames]
    return times, torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in frames]).permute(
        0, 3, 1, 2
    )


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mp4", "mpeg4"),
        ("a.mp4", "libx265"),
        ("a.mp4", "libsvtav1"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.webm", "libvpx"),
        ("a.avi", "mjpeg"),
        ("a.mov", "libx264"),
        ("a.ts", "libx264"),
        ("a.flv", "flv"),
        ("a.wmv", "wmv2"),
        ("a.mpg", "mpeg1video"),
    ],
)
def test_containers(tmp_path: Path, name: str, codec: str) -> None:
    """Their headers, and frames in any order, are those of all frames decoded in order; with B-frames and without."""
    if name == "a.mpg":
        path = encode(tmp_path / name, codec, range(0, 800, 40))
    else:
        path = encode(tmp_path / name, codec)
    times, frames = in_order(path)
    header = PyAvBackend().header(str(path))
    assert header == VideoHeader(20, pytest.approx(25.0 if name == "a.mpg" else 10.0), HEIGHT, WIDTH)
    assert np.allclose(times, np.arange(20) / header.fps, atol=0.002)
    indices = np.array([19, 0, 7, 8, 8, 5, 13])
    assert torch.equal(PyAvBackend().frames(str(path), indices), frames[indices])
    assert torch.equal(PyAvBackend().frames(path.read_bytes(), indices[:2]), frames[indices[:2]])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("start", [0, 5000])
def test_uneven_times_are_those_of_the_frames(tmp_path: Path, name: str, start: int) -> None:
    """Seconds after the first frame, in a file that starts at a time of its own too."""
    path = encode(tmp_path / name, "libx264", [start + time for time in UNEVEN])
    header = read_header(str(path))
    times, frames = in_order(path)
    assert header.times is not None
    assert header.times == pytest.approx(times)
    assert times == pytest.approx([time / 1000 for time in UNEVEN])
    assert torch.equal(PyAvBackend().frames(str(path), np.array([21, 2])), frames[[21, 2]])


def test_a_constant_rate_has_no_times(tmp_path: Path) -> None:
    assert read_header(str(encode(tmp_path / "a.mkv", "libx264", range(0, 1000, 100)))).times is None


def test_a_search_that_ends_behind_a_frame_starts_anew(tmp_path: Path) -> None:
    """In transport streams places are guessed: the first frames are not found by seeking."""
    path = encode(tmp_path / "a.ts", "libx264")
    _, frames = in_order(path)
    for index in range(20):
        assert torch.equal(PyAvBackend().frames(str(path), np.array([index])), frames[[index]])


def test_a_codec_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    content = bytearray(encode(tmp_path / "a.mp4").read_bytes())
    start = content.find(b"mdat") + 4
    content[start : content.find(b"moov") - 4] = bytes(content.find(b"moov") - 4 - start)
    with pytest.raises(SampleError) as caught:
        read_header(bytes(content))
    assert caught.value.category == "unreadable_file"
    assert "mpeg4" in caught.value.reason or "no frames" in caught.value.reason


def test_frames_before_an_edit_list_are_not_counted(tmp_path: Path) -> None:
    """As of a phone clip that was trimmed without being encoded anew: they only serve to decode the others."""
    content = bytearray(encode(tmp_path / "a.mp4", "libx264").read_bytes())
    place = content.find(b"elst") + 16
    start = int.from_bytes(content[place : place + 4], "big")
    with av.open(str(tmp_path / "a.mp4")) as container:
        three = round(0.3 / container.streams.video[0].time_base)
    content[place : place + 4] = (start + three).to_bytes(4, "big")
    (tmp_path / "cut.mp4").write_bytes(content)
    _, expected = in_order(tmp_path / "cut.mp4")
    header = read_header(str(tmp_path / "cut.mp4"))
    assert header.num_frames == len(expected) == 17
    indices = np.array([0, 1, 16])
    assert torch.equal(PyAvBackend().frames(str(tmp_path / "cut.mp4"), indices), expected[indices])
    assert torch.equal(expected[0], in_order(tmp_path / "a.mp4")[1][3])
