"""Mistakes under torchrun: one message for all ranks, and a prompt end, whoever finds them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import ERROR, REPOSITORY, flags
from tests.e2e.test_errors import GOOD, Place, sample


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Place:
    return Place(tmp_path, tiny_checkpoint("qwen3_vl"))


def start(*command: str, folder: Path) -> tuple[int, str]:
    """Run a command; return its exit code and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, *command],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return result.returncode, result.stdout


SCRIPT = str(REPOSITORY / "qwenvl" / "train" / "train_qwen.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def own_tracebacks(output: str) -> list[str]:
    """Tracebacks but for the one that torchrun prints of itself when any rank fails."""
    blocks = output.split("Traceback (most recent call last)")[1:]
    return [block for block in blocks if "ChildFailedError" not in block]


def test_one_message_under_torchrun_for_what_every_rank_finds(place: Place) -> None:
    code, output = start(*TORCHRUN, SCRIPT, *place.flags(dataset_use="sat"), folder=place.folder)
    assert code != 0
    assert len(ERROR.findall(output)) == 1, output
    assert output.count("'sat'") == 1, output
    assert own_tracebacks(output) == [], output


def test_one_message_under_torchrun_for_what_one_rank_finds(place: Place) -> None:
    """The other rank waits for gradients that never come, for half an hour if it may; the run must end before."""
    place.write(*[GOOD] * 7, sample("<image>", image="cut.jpg"))
    arguments = place.flags(max_steps=8, per_device_train_batch_size=1, save_strategy="steps", save_steps=1)
    code, output = start(*TORCHRUN, SCRIPT, *arguments, folder=place.folder)
    assert code != 0
    assert len(ERROR.findall(output)) == 1, output
    assert output.count("cut.jpg") == 1, output
    assert own_tracebacks(output) == [], output
    assert list(place.output.glob("checkpoint-*"))


def test_the_launcher_adds_no_traceback_of_its_own(place: Place) -> None:
    launcher = str(REPOSITORY / "qwenvl" / "train" / "launch.py")
    code, output = start(
        launcher, "--standalone", "--nproc_per_node=2", SCRIPT, *place.flags(dataset_use="sat"), folder=place.folder
    )
    assert code == 1
    assert len(ERROR.findall(output)) == 1, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_rank_that_misses_another_says_so_in_one_message(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Two machines as it were: no launcher here ends the one when the other dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks, logs = [], []
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, max_steps=2000)
    for rank in ("0", "1"):
        logs.append(tmp_path / f"{rank}.log")
        environment = os.environ | common | {"RANK": rank, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        script = [sys.executable, SCRIPT]
        with logs[-1].open("w") as log:
            ranks.append(subprocess.Popen([*script, *command], env=environment, stdout=log, stderr=log))
    try:
        deadline = time.monotonic() + 900
        while logs[0].read_text().count(": loss ") < 2:
            assert time.monotonic() < deadline and ranks[0].poll() is None, logs[0].read_text()
            time.sleep(0.2)
        ranks[1].kill()
        assert ranks[0].wait(900) == 1
    finally:
        for process in ranks:
            process.kill()
    text = logs[0].read_text()
    assert "Traceback" not in text
    (message,) = ERROR.findall(text)
    assert message.startswith("Lost the connection to another rank") and "Run the same command again" in message
