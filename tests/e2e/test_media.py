"""Media that people bring, in a run: the model is trained on the ids and pixels that show_sample shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvl.cli.show_sample import main as show_sample
from tests.data.clips import UNEVEN, encode
from tests.e2e.runs import open_trainer
from tests.patches import patchify_of


def gray_of_16_bits(folder: Path) -> str:
    values = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(values).save(folder / "a.png")
    return "a.png"


def animation(name: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        frames = [Image.new("RGB", (64, 48), (10 * number,) * 3) for number in range(20)]
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], duration=100, lossless=True)
        return name

    return write


def clip(name: str, codec: str, times: Any = range(0, 2000, 100)) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        encode(folder / name, codec, times)
        return name

    return write


def folder_of_frames(folder: Path) -> dict[str, Any]:
    (folder / "frames").mkdir()
    names = [f"frames/{number:03}.jpg" for number in range(6)]
    for number, name in enumerate(names):
        Image.new("RGB", (64, 48), (40 * number,) * 3).save(folder / name)
    return {"frames": names, "fps": 2}


MEDIA: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "gray of 16 bits": ("image", gray_of_16_bits),
    "AV1": ("video", clip("a.mp4", "libsvtav1")),
    "transport stream": ("video", clip("a.ts", "libx264")),
    "GIF": ("video", animation("a.gif")),
    "animated WebP": ("video", animation("a.webp")),
    "folder of frames": ("video", folder_of_frames),
    "uneven frames": ("video", clip("a.mp4", "libx264", UNEVEN)),
}


@pytest.mark.parametrize("medium", MEDIA)
def test_a_run_trains_on_what_is_shown(medium: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    kind, write = MEDIA[medium]
    turns = [{"from": "human", "value": f"<{kind}>What?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "set.json").write_text(json.dumps([{"id": "0", kind: [write(tmp_path)], "conversations": turns}]))
    entry = {"annotation_path": str(tmp_path / "set.json"), "data_path": str(tmp_path)}
    (tmp_path / "registry.py").write_text(f"data_dict = {{'set': {entry!r}}}\n")
    limits = {
        "max_pixels": "64*96",
        "min_pixels": "32*32",
        "video_max_pixels": "4*64*64",
        "video_min_pixels": "4*32*32",
    }
    limits |= {"video_max_frames": 8, "video_min_frames": 4}
    model = tiny_checkpoint("qwen3_vl")
    flags = [text for name, value in limits.items() for text in (f"--{name}", str(value))]
    data = ["--dataset_use", "set", "--dataset_registry", str(tmp_path / "registry.py")]
    shown_in = tmp_path / "shown.jsonl"
    assert show_sample([*data, *flags, "--model_name_or_path", str(model), "--json", str(shown_in)]) == 0
    shown = json.loads(shown_in.read_text())
    settings = {"dataset_use": "set", "per_device_train_batch_size": 1, "max_steps": 2, **limits}
    trainer = open_trainer(model, tmp_path / "out", tmp_path / "registry.py", **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = torch.tensor(shown["labels"])
    kept = (labels[1:] != -100).nonzero().squeeze(1)
    assert batch["input_ids"][0].tolist() == shown["input_ids"]
    assert torch.equal(batch["kept_positions"], kept) and torch.equal(batch["targets"], labels[kept + 1])
    assert batch["position_ids"][1:, 0].tolist() == shown["position_ids"]
    patches = patchify_of(model)(batch["pixels"], batch["media"])
    pixels = shown["pixel_values" if kind == "image" else "pixel_values_videos"]
    assert list(patches.shape) == pixels["shape"]
    assert patches.double().mean().item() == pytest.approx(pixels["mean"]) and pixels["std"] > 0.1
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses) and losses[1] < losses[0]
