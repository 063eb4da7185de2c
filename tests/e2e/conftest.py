"""Small real data for whole runs: pictures, short mp4 clips and text, registered as a user would register them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qwenvl.train.train_qwen import main
from qwenvl.train.trainer import Trainer
from tests.e2e.labelled import write_labelled
from tests.e2e.runs import ERROR, open_trainer

# What each sample of "mixed" holds, and the words of its answer: counts so different that a mean of means shows.
MIXED: tuple[tuple[tuple[str, ...], int], ...] = (
    ((), 1),
    (("image",), 40),
    (("image", "image"), 2),
    (("video",), 25),
    (("video", "image"), 3),
    ((), 60),
    (("image",), 1),
    (("video",), 9),
    ((), 5),
    (("image", "video"), 30),
    (("image",), 12),
)
_WORDS = "the a red blue square circle moves left right up down slowly cat dog one two three".split()


def _picture(path: Path, generator: np.random.Generator) -> None:
    height, width = (int(side) for side in generator.integers(40, 90, 2))
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def _clip(path: Path, generator: np.random.Generator, frames: int = 10, rate: int = 4) -> None:
    """Write an mp4 of a bright square that moves over a dark ground."""
    top = int(generator.integers(0, 32))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        for number in range(frames):
            pixels = np.full((64, 80, 3), 20, np.uint8)
            pixels[top : top + 24, 4 * number : 4 * number + 24] = (240, 60 + 15 * number, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _record(folder: Path, number: int, media: tuple[str, ...], words: int) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    record: dict[str, Any] = {"id": f"sample-{number}"}
    for position, kind in enumerate(media):
        name = f"{number}-{position}.{'png' if kind == 'image' else 'mp4'}"
        (_picture if kind == "image" else _clip)(folder / name, generator)
        record.setdefault(kind, []).append(name)
    tags = "".join(f"<{kind}>\n" for kind in media)
    answer = " ".join(generator.choice(_WORDS, words))
    record["conversations"] = [
        {"from": "human", "value": f"{tags}Sample {number}: what is here?"},
        {"from": "gpt", "value": f"{answer}."},
    ]
    return record


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a registry file with datasets of eleven samples or fewer.

    ``mixed``: every kind of sample; ``text`` and ``pictures``: those with no or with still media only; ``held_out``:
    another four, one of each kind.
    """
    folder = tmp_path_factory.mktemp("data")
    mixed = [_record(folder, number, media, words) for number, (media, words) in enumerate(MIXED)]
    held_out = [_record(folder, 100 + number, *MIXED[number]) for number in (1, 3, 5, 4)]
    sets = {
        "mixed": mixed,
        "text": [record for record in mixed if "image" not in record and "video" not in record],
        "pictures": [record for record in mixed if "image" in record and "video" not in record],
        "held_out": held_out,
    }
    for name, records in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    entries = {name: {"annotation_path": str(folder / f"{name}.json"), "data_path": str(folder)} for name in sets}
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return folder / "registry.py"


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Return a function of a command line that returns the one message it ends with."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 1
        output = "".join(capsys.readouterr())
        messages = ERROR.findall(output)
        assert len(messages) == 1, output
        assert "Traceback" not in output
        return str(messages[0])

    return run


@pytest.fixture(scope="session")
def publish(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function of the family that makes a tiny checkpoint with the names and layouts of published ones.

    Qwen2-VL and Qwen2.5-VL: ``model.layers`` and ``visual``; Qwen3-VL-MoE: experts as [experts, in, out].
    """

    def function(family: str) -> Path:
        folder = tmp_path_factory.mktemp("published") / family
        shutil.copytree(tiny_checkpoint(family), folder)
        tensors = load_file(folder / "model.safetensors")
        if family.startswith("qwen2"):
            tensors = {
                name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
                for name, tensor in tensors.items()
            }
        tensors = {
            name: tensor.transpose(1, 2).contiguous() if ".experts." in name and family == "qwen3_vl_moe" else tensor
            for name, tensor in tensors.items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return function


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function of the task that returns a registry of labelled samples, ``samples`` and ``held_out``."""
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture
def trainer_of(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Return a function of a family and settings that opens a trainer, whose output folder is ``out``."""

    def open_one(family: str = "qwen3_vl", **settings: Any) -> Trainer:
        return open_trainer(tiny_checkpoint(family), tmp_path / "out", registry, **settings)

    return open_one
