"""Checkpoints that bring code with them: none of it runs unless it is asked for."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwenvl.models.loading import load_model
from qwenvl.train.checkpoint import manifest
from qwenvl.train.train_qwen import main
from tests.e2e.runs import flags, train


def test_code_of_a_checkpoint_is_not_run(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder, proof = tmp_path / "checkpoint", tmp_path / "it ran"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), folder)
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(str(folder), dtype=torch.float32, attn_implementation="sdpa")
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert not proof.exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.proof), "w")


@pytest.fixture(scope="module")
def stopped(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that can go on from its first step."""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "dataset_use": "text"}
    return train(tiny_checkpoint("qwen3_vl"), tmp_path_factory.mktemp("stopped") / "run", registry, **settings)


@pytest.fixture
def resumed(stopped: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path) -> list[str]:
    """The command line that goes on with a copy of that run, in ``tmp_path / "run"``."""
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1" / manifest.NAME).unlink()  # an attacker would write a new one
    return flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, max_steps=2, dataset_use="text")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_the_state_of_a_run_is_not_run(
    name: str, resumed: list[str], tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    proof = tmp_path / "it ran"
    torch.save(Payload(proof), tmp_path / "run" / "checkpoint-1" / name)
    if name == "training_args.bin":  # which nothing reads
        assert main(resumed) == 0
    else:
        message = fail(resumed)
        assert f"checkpoint-1/{name} is damaged, or holds more than the state of a run" in message
        assert "Weights only load failed" in message
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists(), "the code works where it is let"


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 and no more"])
def test_damaged_state_of_a_run_is_one_message(
    content: bytes, resumed: list[str], tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").write_bytes(content)
    message = fail(resumed)
    assert "checkpoint-1/optimizer.pt is damaged" in message and "--resume_from_checkpoint" in message
