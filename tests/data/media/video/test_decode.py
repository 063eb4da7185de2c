"""Video backends: they work where their libraries do, agree with each other, and explain what they cannot read."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from qwenvl.data.media.video.backend import UndecodedVideoError, VideoBackend, VideoHeader
from qwenvl.data.media.video.decode import (
    FallbackBackend,
    PyAvBackend,
    TorchcodecBackend,
    backend_name,
    choose_backend,
    prepare_backend,
)
from qwenvl.utils.errors import SampleError, UserError

REPOSITORY = Path(__file__).resolve().parents[4]
FRAMES, FPS, HEIGHT, WIDTH = 24, 8, 48, 64


def make_video(path: Path, frames: int = FRAMES, fps: int = FPS) -> Path:
    """Write an mp4 whose frames get brighter from one to the next; the left third is green."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            pixels = np.full((HEIGHT, WIDTH, 3), number * 10, dtype=np.uint8)
            pixels[:, : WIDTH // 3, 1] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a copy whose track header says that it is to be shown turned by ``matrix``."""
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44  # past the fields of a version 0 track header
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned = path.with_name("turned.mp4")
    turned.write_bytes(content)
    return turned


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "a.mp4")


def load(kind: type[TorchcodecBackend] | type[PyAvBackend]) -> VideoBackend:
    try:
        return kind()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[TorchcodecBackend, PyAvBackend])
def backend(request: pytest.FixtureRequest) -> VideoBackend:
    return load(request.param)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_headers_and_frames(backend: VideoBackend, video: Path, as_bytes: bool) -> None:
    source = video.read_bytes() if as_bytes else str(video)
    assert backend.header(source) == VideoHeader(FRAMES, FPS, HEIGHT, WIDTH)
    frames = backend.frames(source, np.array([0, 5, 5, 20, 23]))
    assert (frames.shape, frames.dtype) == ((5, 3, HEIGHT, WIDTH), torch.uint8)
    brightness = frames[:, 0, :, WIDTH // 2 :].float().mean((1, 2))
    assert torch.allclose(brightness, torch.tensor([0.0, 50, 50, 200, 230]), atol=6)
    assert (frames[0, 1, :, : WIDTH // 3 - 4] > 180).all(), "the left third is green"


def test_backends_agree(video: Path) -> None:
    torchcodec, pyav = load(TorchcodecBackend), load(PyAvBackend)
    indices = np.arange(FRAMES)[::-1].copy()
    assert torchcodec.header(str(video)) == pyav.header(str(video))
    difference = (torchcodec.frames(str(video), indices).int() - pyav.frames(str(video), indices).int()).abs()
    assert difference.float().mean() < 1.5 and difference.max() < 16


@pytest.mark.parametrize(
    ("matrix", "quarter_turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_turned_videos_are_shown_turned(
    backend: VideoBackend, video: Path, matrix: tuple[int, int, int, int], quarter_turns: int
) -> None:
    turned = str(turn(video, matrix))
    upright = backend.frames(str(video), np.array([3]))
    expected = torch.rot90(upright, quarter_turns, (2, 3))
    header = backend.header(turned)
    assert (header.height, header.width) == expected.shape[2:]
    difference = (backend.frames(turned, np.array([3])).int() - expected.int()).abs()
    assert difference.float().mean() < 2


def test_a_single_frame_is_a_video(backend: VideoBackend, tmp_path: Path) -> None:
    path = str(make_video(tmp_path / "one.mp4", frames=1))
    assert backend.header(path).num_frames == 1
    assert backend.frames(path, np.array([0])).shape[0] == 1


@pytest.mark.parametrize("content", ["junk", "cut", "a picture", "sound"])
def test_what_cannot_be_decoded_is_explained(backend: VideoBackend, video: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.mp4"
    if content == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    else:
        whole = video.read_bytes()
        path.write_bytes({"junk": b"junk" * 999, "cut": whole[: len(whole) // 2], "a picture": b"\x89PNG" * 9}[content])
    with pytest.raises(SampleError) as caught:
        backend.header(str(path))
    said = {
        "junk": "it starts with b'junk",
        "cut": "It may be cut off",
        "a picture": "it holds an image, not a video",
        "sound": "the file has no video, only audio.",
    }
    assert said[content] in caught.value.reason and "\n" not in caught.value.reason
    assert caught.value.category == ("unreadable_file" if content in ("cut", "sound") else "wrong_type")


def test_frames_lost_in_the_middle_are_an_error(backend: VideoBackend, video: Path, tmp_path: Path) -> None:
    """A file whose header promises frames that it does not hold."""
    content = bytearray(video.read_bytes())
    start = content.find(b"mdat") + 4
    content[start : start + (len(content) - start) // 2] = bytes((len(content) - start) // 2)
    path = tmp_path / "holes.mp4"
    path.write_bytes(content)
    with pytest.raises(SampleError):
        backend.frames(str(path), np.arange(FRAMES))


def test_one_backend_is_chosen_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Torchcodec where its libraries load, else PyAV."""
    try:
        expected: str = TorchcodecBackend().name
    except ImportError:
        expected = PyAvBackend().name
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, "qwenvl"):
        assert choose_backend() is choose_backend()
    assert choose_backend().name == expected
    (said,) = [record.message for record in caplog.records if record.name == "qwenvl.data.media.video.decode"]
    assert f"decoded by {expected}" in said


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("data/media/video/test_decode.py", "TorchcodecBackend or backends_agree or one_backend_is_chosen"),
        pytest.param("data/media/test_video_timeout.py", "TorchcodecBackend", marks=slow),
        pytest.param("inference/test_generate.py", "inputs_are_those", marks=slow),
        pytest.param("fuzz/test_media.py", "TorchcodecBackend", marks=slow),
        pytest.param("fuzz/test_reach.py", "TorchcodecBackend", marks=slow),
    ],
)
def test_without_ffmpeg_its_libraries_in_pyav_serve_torchcodec(tmp_path: Path, file: str, chosen: str) -> None:
    """What would be skipped here runs in a process that finds them under the names that FFmpeg gives them."""
    with contextlib.suppress(ImportError):
        TorchcodecBackend()
        pytest.skip("torchcodec works here, and its tests run")
    libraries = Path(av.__file__).parents[1] / "av.libs"
    if not libraries.is_dir():
        pytest.skip("PyAV was not installed from a wheel for Linux")
    for library in libraries.iterdir():
        if name := re.fullmatch(r"(lib\w+)-\w+(\.so\.\d+)(\.\d+)*", library.name):
            (tmp_path / f"{name[1]}{name[2]}").symlink_to(library)
    environment = os.environ | {"LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", f"({chosen}) and not in_pyav"]
    command.append(str(REPOSITORY / "tests" / file))
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_a_process_without_a_backend_says_why_when_there_is_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("torchcodec", "av"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it was not installed
    choose_backend.cache_clear()
    try:
        prepare_backend()
        assert backend_name() is None
        with pytest.raises(UserError, match=r"No video backend works: .*torchcodec.*; .*av.*Run 'pip install av'"):
            choose_backend()
    finally:
        choose_backend.cache_clear()
    monkeypatch.undo()
    assert backend_name() == choose_backend().name


@pytest.mark.parametrize(("limit", "counts"), [(3.9, [3, 3, 3, 1]), (4, [4, 4, 2]), (10, [10]), (0.5, [1] * 10)])
def test_frames_are_made_smaller_some_at_a_time(
    backend: VideoBackend, video: Path, limit: float, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of them than the limit, in bytes of frames of three colours, and one at least."""
    monkeypatch.setattr("qwenvl.data.media.video.backend.PIECE_BYTES", int(limit * 3 * HEIGHT * WIDTH))
    indices = np.array([23, 0, 5, 5, 7, 9, 11, 13, 15, 17])
    seen: list[int] = []

    def shrink(frames: torch.Tensor) -> torch.Tensor:
        seen.append(len(frames))
        return frames[..., ::2, ::4]

    small = backend.frames(str(video), indices, shrink)
    assert seen == counts
    assert torch.equal(small, backend.frames(str(video), indices)[..., ::2, ::4])


class Old:
    """A backend that opens nothing, or leaves out frames, as an old FFmpeg does."""

    name = "old"

    def header(self, source: str | bytes) -> VideoHeader:
        return PyAvBackend().header(source)

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Any = None) -> torch.Tensor:
        raise UndecodedVideoError("unreadable_file", "old cannot decode it")


def test_what_the_chosen_backend_cannot_decode_pyav_does(video: Path) -> None:
    both = FallbackBackend(Old())
    indices = np.array([3, 20])
    assert both.header(str(video)) == VideoHeader(FRAMES, FPS, HEIGHT, WIDTH)
    assert torch.equal(both.frames(str(video), indices), PyAvBackend().frames(str(video), indices))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.mp4"])
def test_animations_are_for_pillow(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.mp4":
        make_video(path, 3)
    else:
        frames = [Image.new("RGB", (WIDTH, HEIGHT), (90 * number, 0, 0)) for number in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, lossless=True)
    for source in (str(path), path.read_bytes()):
        header = FallbackBackend(PyAvBackend()).header(source)
        assert (header.num_frames, header.height, header.width) == (3, HEIGHT, WIDTH)
        assert FallbackBackend(PyAvBackend()).frames(source, np.array([2, 0])).shape == (2, 3, HEIGHT, WIDTH)


def test_torchcodec_that_knows_of_fewer_frames_is_passed_over(video: Path) -> None:
    torchcodec = load(TorchcodecBackend)
    with pytest.raises(UndecodedVideoError, match=f"torchcodec finds {FRAMES} frames"):
        torchcodec.frames(str(video), np.array([FRAMES]))
