"""Saved folders in transformers 4.57: the prompts of training, and what the trainer's own model says behind them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.media.video.decode import choose_backend
from qwenvl.data.types import ImageItem, TextPart, VideoItem
from qwenvl.serving.inputs import asked
from tests.clients.reference import Row, next_token, open_float32, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.client("transformers", kind="whole", arguments="none; see below")]
SCRIPT = Path(__file__).with_name("transformers4.py")


def request_of(row: Row) -> dict[str, Any]:
    """Return a prompt as a user of transformers writes it.

    Videos are decoded whole, and the processor samples them. Those of Qwen2.5-VL are sampled already, with their rate:
    transformers 4 takes the rate that was asked for, 2 by default, for the one that frames have.
    """
    messages, metadata = [], []
    videos = iter([medium for medium in row.plan.media if isinstance(medium, VideoPlan)])
    sampled = row.serving.encoder.settings.family.timed_positions
    media: dict[str, Any] = {"do_sample_frames": not sampled}
    for message in asked(row.serving, row.plan):
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, ImageItem):
                content.append({"type": "image", "image": row.serving.sources(row.sample).locate(part.source)})
            else:
                assert isinstance(part, VideoItem)
                path = str(row.serving.sources(row.sample).locate(part.source))
                plan = next(videos)
                chosen = plan.indices if sampled else np.arange(plan.num_frames)
                content.append({"type": "video", "video": choose_backend().frames(path, chosen)})
                metadata.append({"total_num_frames": plan.num_frames, "fps": plan.fps})
                media |= {"fps": plan.sampled_fps} if sampled else {}
        messages.append({"role": message.role, "content": content})
    return {"messages": messages, "metadata": metadata, "media": media}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_saved_folders_open_with_the_same_prompts_and_logits(
    family: str, transformers4: Path, trained: Callable[..., Path], registry: Path, tmp_path: Path
) -> None:
    # Its processor of Qwen2-VL and Qwen2.5-VL has limits of a frame alone, none that a clip's frames share.
    folder = trained(family, video_max_frame_pixels=None if family.startswith("qwen3") else "64*64")
    rows = list(rows_of(folder, "--dataset_registry", str(registry), "--dataset_use", "mixed"))
    torch.save([request_of(row) for row in rows], tmp_path / "requests.pt")
    command = [transformers4 / "bin" / "python", SCRIPT, folder, tmp_path / "requests.pt", tmp_path / "answers.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = torch.load(tmp_path / "answers.pt")
    assert answers["version"].startswith("4.")
    model = open_float32(folder)
    for row, answer in zip(rows, answers["found"], strict=True):
        assert answer["ids"] == row.inputs().input_ids.tolist(), row.name
        assert float((answer["next"] - next_token(model, row)).abs().max()) < 1e-4, row.name
