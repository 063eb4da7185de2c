"""Mistakes under torchrun: one message for all ranks, and a prompt end, whoever finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.runs import ERROR, REPOSITORY
from tests.train.test_errors import GOOD, Place, sample


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Place:
    return Place(tmp_path, tiny_checkpoint("qwen3_vl"))


def start(*command: str, folder: Path) -> tuple[int, str, float]:
    """Run a command; return its exit code, what it printed, and the seconds it took."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, *command],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return result.returncode, result.stdout, time.monotonic() - begin


SCRIPT = str(REPOSITORY / "qwenvl" / "train" / "train_qwen.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def own_tracebacks(output: str) -> list[str]:
    """Tracebacks but for the one that torchrun prints of itself when any rank fails."""
    blocks = output.split("Traceback (most recent call last)")[1:]
    return [block for block in blocks if "ChildFailedError" not in block]


def test_one_message_under_torchrun_for_what_every_rank_finds(place: Place) -> None:
    code, output, _ = start(*TORCHRUN, SCRIPT, *place.flags(dataset_use="sat"), folder=place.folder)
    assert code != 0
    assert len(ERROR.findall(output)) == 1, output
    assert output.count("'sat'") == 1, output
    assert own_tracebacks(output) == [], output


def test_one_message_under_torchrun_for_what_one_rank_finds(place: Place) -> None:
    """The other rank waits for gradients that never come; the run must end all the same, and soon."""
    place.write(*[GOOD] * 7, sample("<image>", image="cut.jpg"))
    arguments = place.flags(max_steps=8, per_device_train_batch_size=1, save_strategy="steps", save_steps=1)
    code, output, seconds = start(*TORCHRUN, SCRIPT, *arguments, folder=place.folder)
    assert code != 0
    assert len(ERROR.findall(output)) == 1, output
    assert output.count("cut.jpg") == 1, output
    assert own_tracebacks(output) == [], output
    assert seconds < 200
    assert list(place.output.glob("checkpoint-*"))


def test_the_launcher_adds_no_traceback_of_its_own(place: Place) -> None:
    launcher = str(REPOSITORY / "qwenvl" / "train" / "launch.py")
    code, output, _ = start(
        launcher, "--standalone", "--nproc_per_node=2", SCRIPT, *place.flags(dataset_use="sat"), folder=place.folder
    )
    assert code == 1
    assert len(ERROR.findall(output)) == 1, output
    assert "Traceback" not in output
