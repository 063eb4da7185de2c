"""Whole runs over a video that its decoder never reads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwenvl.data.media.video import decode as video
from qwenvl.data.media.video.backend import Shrink, VideoHeader
from qwenvl.train.train_qwen import main
from tests.data.media.video.test_decode import make_video
from tests.e2e.runs import history
from tests.e2e.test_errors import GOOD, Place, sample

STUCK = {**sample("<video>\nWhat?", video="stuck.mp4", image=None), "id": "stuck"}
SEEN = {**sample("<video>\nWhat?", video="good.mp4", image=None), "id": "seen"}


class Stuck:
    """A backend that has decoded one file already, and waits for ever for the frames of another.

    Args:
        path: The file that it has decoded.
    """

    def __init__(self, path: Path) -> None:
        backend = video.choose_backend()
        self.name = backend.name
        self._header = backend.header(str(path))
        self._frames = backend.frames(str(path), np.arange(self._header.num_frames))

    def header(self, source: str | bytes) -> VideoHeader:
        return self._header

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink) -> torch.Tensor:
        if str(source).endswith("stuck.mp4"):
            time.sleep(6000)
        return shrink(self._frames[torch.from_numpy(indices)])


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path, tiny_checkpoint("qwen3_vl"))
    for name in ("good.mp4", "stuck.mp4"):
        make_video(tmp_path / name)
    place.write(GOOD, STUCK, SEEN)
    backend = Stuck(tmp_path / "good.mp4")
    monkeypatch.setattr(
        "qwenvl.data.media.reader.choose_backend", lambda: backend
    )  # workers are forked, and have it too
    return place


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stuck_video_is_left_out_and_the_run_goes_on(place: Place, workers: int) -> None:
    settings = {"on_bad_sample": "skip", "num_train_epochs": 1, "max_steps": None, "per_device_train_batch_size": 1}
    assert main(place.flags(dataloader_num_workers=workers, video_timeout=3, **settings)) == 0
    (record,) = map(json.loads, (place.output / "bad_samples.jsonl").read_text().splitlines())
    assert (record["id"], record["line"], record["category"]) == ("stuck", 2, "timeout")
    assert f"{place.folder}/stuck.mp4" in record["reason"]
    assert sum(loss > 0 for loss in history(place.output)) == 2


def test_a_stuck_video_stops_the_run_by_default(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    flags = place.flags(dataloader_num_workers=2, video_timeout=3, num_train_epochs=1, max_steps=None)
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert f"{place.annotations}:2 (id 'stuck')" in error
    assert "--video_timeout" in error and "Traceback" not in error
