"""Folders that the trainer saves, for the programs that people serve and evaluate them with.

The programs have environments of their own, made by ``scripts/test.sh --clients`` or by hand; tests are skipped where
the variable that names one is not set: CLIENTS_VLLM, CLIENTS_TRANSFORMERS4, CLIENTS_LMMS_EVAL, CLIENTS_MLX_VLM and
CLIENTS_LLAMA_CPP are virtual environments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from tests.clients.recording import pytest_itemcollected, pytest_runtest_makereport  # noqa: F401  hooks
from tests.e2e.runs import train

ROWS: tuple[tuple[str, ...], ...] = ((), ("image",), ("image", "image"), ("video",), ("long",), ("video", "image"))
"""Media of each row; the long clip has more frames at 2 per second than training takes."""

RUN: dict[str, Any] = {
    "max_steps": 12,
    "per_device_train_batch_size": 3,
    "max_pixels": "96*96",
    "min_pixels": "56*56",
    "video_max_pixels": "8*64*64",
    "video_max_frames": 8,
    "video_min_frames": 4,
    "model_max_length": 512,
    "logging_steps": 6,
}


def environment(variable: str) -> Path:
    """Return the environment that a variable names; skip the test where it is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no environment: bash scripts/test.sh --clients makes one")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def vllm() -> Path:
    """Return the environment with vLLM."""
    return environment("CLIENTS_VLLM")


@pytest.fixture(scope="session")
def mlx_vlm() -> Path:
    """Return the environment with mlx-vlm."""
    return environment("CLIENTS_MLX_VLM")


@pytest.fixture(scope="session")
def transformers4() -> Path:
    """Return the environment with transformers 4.57."""
    return environment("CLIENTS_TRANSFORMERS4")


@pytest.fixture(scope="session")
def lmms_eval() -> Path:
    """Return the environment with lmms-eval."""
    return environment("CLIENTS_LMMS_EVAL")


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """Return the environment with llama.cpp's server, as ``bin/llama-server``, and its converter in ``llama.cpp``."""
    return environment("CLIENTS_LLAMA_CPP")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a registry with ``mixed``, ``images`` without its clips, and ``rows``, 20 with a system turn."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    rows = [_row(folder, number, media, generator) for number, media in enumerate(ROWS)]
    sets = {"mixed": rows, "images": [row for row in rows if "video" not in row]}
    sets["rows"] = [_asked(folder, number, generator) for number in range(20)]
    for name, chosen in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(chosen))
    entries = {name: {"annotation_path": str(folder / f"{name}.json"), "data_path": str(folder)} for name in sets}
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return folder / "registry.py"


def _row(folder: Path, number: int, media: tuple[str, ...], generator: np.random.Generator) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"row-{number}"}
    for place, kind in enumerate(media):
        name = f"{number}-{place}.{'png' if kind == 'image' else 'mp4'}"
        if kind == "image":
            pixels = generator.integers(0, 256, (*generator.integers(40, 120, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        else:
            _clip(folder / name, frames=80 if kind == "long" else 10)
        row.setdefault("image" if kind == "image" else "video", []).append(name)
    tags = "".join("<image>\n" if kind == "image" else "<video>\n" for kind in media)
    answer = " ".join(generator.choice("red blue left right cat dog one two".split(), 6))
    row["conversations"] = [
        {"from": "human", "value": f"{tags}Row {number}: what is here?"},
        {"from": "gpt", "value": f"{answer}."},
    ]
    return row


def _asked(folder: Path, number: int, generator: np.random.Generator) -> dict[str, Any]:
    """Return a row as lmms-eval asks it: with a system turn, and an image larger or smaller than the limits."""
    width, height = generator.integers(30, 300, 2)
    squares = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    squares.resize((int(width), int(height)), Image.Resampling.BILINEAR).save(folder / f"row-{number}.png")
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "<image>What is here?"},
        {"role": "assistant", "content": " ".join(generator.choice("red blue left right cat dog one two".split(), 4))},
    ]
    return {"id": f"row-{number}", "image": f"row-{number}.png", "messages": messages}


def _clip(path: Path, frames: int) -> None:
    """Write four frames per second of a square that moves."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for number in range(frames):
            pixels = np.full((64, 80, 3), 20, np.uint8)
            left = 4 * (number % 12)
            pixels[8:32, left : left + 24] = (240, 60 + 2 * number, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def trained(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function of a family and settings that trains a model of the demo's size, once for each of them.

    ``text`` has settings of the language model's config that the model has in place of the demo's.
    """
    done: dict[str, Path] = {}

    def function(family: str, text: Mapping[str, Any] | None = None, **settings: Any) -> Path:
        key = json.dumps([family, text, settings])
        if key not in done:
            folder = tmp_path_factory.mktemp(family)
            build_tiny_checkpoint(family, folder / "base", size="demo")
            if text is not None:
                _rebuild(folder / "base", text)
            done[key] = train(folder / "base", folder / "out", registry, **{**RUN, **settings})
        return done[key]

    return function


def _rebuild(folder: Path, text: Mapping[str, Any]) -> None:
    """Give a checkpoint random weights of other shapes; its layers for multi-token prediction keep theirs."""
    file = folder / "model.safetensors"
    mtp = {name: tensor for name, tensor in load_file(file).items() if name.startswith("mtp.")}
    config = AutoConfig.from_pretrained(folder)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_file({**load_file(file), **mtp}, file, {"format": "pt"})
