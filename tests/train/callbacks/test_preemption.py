"""Whatever stops a run, and whenever: what is left is whole, and a new start ends like the run that was not stopped."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwenvl.train.checkpoint import manifest
from qwenvl.train.checkpoint.folder import DRAFTS, find_checkpoint, problem_of
from qwenvl.train.train_qwen import main
from tests.e2e.runs import REPOSITORY, equal_bits, flags, history, read_annotations, train

STEPS: dict[str, Any] = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "per_device_train_batch_size": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_dataset_use": "held_out",
}


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    return train(tiny_checkpoint("qwen3_vl"), tmp_path_factory.mktemp("whole") / "run", registry, **STEPS)


KILLED = """
import json, os, runpy, signal, sys

moments = json.loads(sys.argv[1])


def watch(event, arguments):
    if event == moments[0][0] and moments[0][1] in str(arguments[0]):
        if len(moments) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        del moments[0]


sys.addaudithook(watch)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Run a script that kills itself at the last of some moments, each an audit event of Python and a part of its path."""


def run_killed(
    model: Path, output: Path, registry: Path, log: Path, *moments: tuple[str, str], **settings: Any
) -> None:
    script = REPOSITORY / "qwenvl" / "train" / "train_qwen.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", KILLED, json.dumps(moments), str(script)]
    with log.open("wb") as file:
        done = subprocess.run(
            [*command, *flags(model, output, registry, **settings)], env=environment, stdout=file, stderr=file
        )
    assert done.returncode == -signal.SIGKILL, log.read_text()


@pytest.mark.slow
def test_killed_while_saving_and_while_training(
    whole: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    model, output = tiny_checkpoint("qwen3_vl"), tmp_path / "run"
    drafts = output / DRAFTS
    moments = {
        "checkpoint-1": ("open", str(drafts / "checkpoint-2" / "processor_config.json")),  # the weights are there
        "checkpoint-3": ("os.rename", str(drafts / "checkpoint-4")),  # it is whole, and has not got its name
        "checkpoint-5": ("os.rmdir", str(output / "checkpoint-3")),  # rotating: its files are gone
    }
    for last, moment in moments.items():
        run_killed(model, output, registry, tmp_path / "log", moment, **STEPS)
        newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
        assert newest.name == last and problem_of(newest) is None  # an older one may be half removed
        assert find_checkpoint(str(output), None) == str(newest)
    resumed = train(model, output, registry, **STEPS)
    assert history(resumed) == history(whole)
    assert equal_bits(resumed, whole)
    assert not drafts.exists()


@pytest.mark.slow
def test_killed_while_evaluating(
    whole: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """After step 2: its loss is logged, then the first picture held out is opened, and then a checkpoint is saved."""
    model, output, log = tiny_checkpoint("qwen3_vl"), tmp_path / "run", tmp_path / "log"
    picture = next(record["image"][0] for record in read_annotations(registry, "held_out") if "image" in record)
    moments = ("os.rename", str(output / DRAFTS / "checkpoint-1")), ("open", str(registry.parent / picture))
    run_killed(model, output, registry, log, *moments, **STEPS)
    assert log.read_bytes().count(b": loss ") == 2 and b"'eval_loss'" not in log.read_bytes()
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = train(model, output, registry, **STEPS)
    assert history(resumed) == history(whole)
    assert history(resumed, "eval_loss") == history(whole, "eval_loss")
    assert equal_bits(resumed, whole)


@pytest.mark.slow
def test_full_disk_is_said_and_the_last_checkpoint_stays(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    whole: Path,
) -> None:
    """A limit on the size of files makes writing fail in the middle of one, as a full disk does."""
    output = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-5", output / "checkpoint-5")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        assert main(flags(tiny_checkpoint("qwen3_vl"), output, registry, **STEPS)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, old)
    assert "checkpoint-6 could not be saved" in caplog.text
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-5"]
    assert problem_of(output / "checkpoint-5") is None
    assert not (output / DRAFTS).exists()
    resumed = train(tiny_checkpoint("qwen3_vl"), output, registry, **STEPS)
    assert equal_bits(resumed, whole)


def start_ranks(model: Path, output: Path, registry: Path, log: Path, **settings: Any) -> subprocess.Popen[bytes]:
    """Start two ranks as the launchers do, with what they say going to ``log``."""
    train_folder = REPOSITORY / "qwenvl" / "train"
    command = [sys.executable, str(train_folder / "launch.py"), "--standalone", "--nproc_per_node=2"]
    command += [str(train_folder / "train_qwen.py"), *flags(model, output, registry, **settings)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


LONG: dict[str, Any] = {
    "max_steps": 60,
    "save_strategy": "steps",
    "save_steps": 30,
    "per_device_train_batch_size": 1,
    "dataloader_num_workers": 1,
}


@pytest.fixture(scope="module")
def whole_on_two_ranks(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with start_ranks(tiny_checkpoint("qwen3_vl"), folder / "run", registry, folder / "log", **LONG) as process:
        assert process.wait(timeout=900) == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["all ranks", "one rank"])
def test_signal_saves_and_the_next_start_goes_on(
    receiver: str, whole_on_two_ranks: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    model, output, log = tiny_checkpoint("qwen3_vl"), tmp_path / "run", tmp_path / "log"
    with start_ranks(model, output, registry, log, **LONG) as process:
        deadline = time.monotonic() + 900
        while b": loss " not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        ranks = psutil.Process(process.pid).children()
        if receiver == "all ranks":
            process.send_signal(signal.SIGTERM)
        else:
            ranks[-1].send_signal(signal.SIGUSR1)
        assert process.wait(timeout=900) == 75, log.read_text()
    (checkpoint,) = output.glob("checkpoint-*")
    assert problem_of(checkpoint) is None
    assert checkpoint.name not in ("checkpoint-30", "checkpoint-60")
    assert f"Stopped on request after step {checkpoint.name[11:]} of 60" in log.read_text()
    assert not list(output.glob("*.safetensors")), "an unfinished run has no final model"
    with start_ranks(model, output, registry, log, **LONG) as process:
        assert process.wait(timeout=900) == 0, log.read_text()
    assert history(output) == history(whole_on_two_ranks)
    assert equal_bits(output, whole_on_two_ranks)


ENDS = {
    signal.SIGSTOP: ["Nothing moved for 40 s (--step_timeout): step ", "dataset 'mixed'", "in _inner_training_loop"],
    signal.SIGKILL: ["Rank 1 was killed by SIGKILL; often because the machine ran out of memory"],
}


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_rank_that_hangs_or_dies_ends_the_run_with_a_message(
    number: signal.Signals, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    settings = {**LONG, "max_steps": 100_000, "save_steps": 100_000, "step_timeout": 40}
    with start_ranks(tiny_checkpoint("qwen3_vl"), output, registry, log, **settings) as process:
        deadline = time.monotonic() + 900
        while b": loss " not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: int(rank.environ()["RANK"]))
        ranks[1].send_signal(number)
        assert process.wait(timeout=900) == (137 if number == signal.SIGKILL else 3), log.read_text()
    said = log.read_text()
    for message in ENDS[number]:
        assert message in said


def damage_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "bytes, and": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "model.safetensors is not as it was saved": damage_bit,
    "manifest.json cannot be read": lambda folder: (folder / manifest.NAME).write_text('{"fil'),
    "there is no trainer_state.json": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json cannot be read": lambda folder: (folder / "trainer_state.json").write_text('{"global_'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoint_is_passed_over(
    message: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("checkpoint-5", "checkpoint-6"):
        shutil.copytree(whole / name, tmp_path / name)
    assert find_checkpoint(str(tmp_path), None) == str(tmp_path / "checkpoint-6")
    DAMAGES[message](tmp_path / "checkpoint-6")
    assert find_checkpoint(str(tmp_path), None) == str(tmp_path / "checkpoint-5")
    assert message in caplog.text


def test_checkpoint_of_the_stock_trainer_has_no_manifest(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / manifest.NAME).unlink()
    assert find_checkpoint(str(tmp_path), None) == str(tmp_path / "checkpoint-6")


def test_files_added_later_do_not_matter(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "notes.txt").write_text("good one")
    assert problem_of(tmp_path / "checkpoint-6") is None


def test_rotation_and_best_checkpoint_work_on_whole_folders(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, whole: Path
) -> None:
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    settings = {**STEPS, "save_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True, "learning_rate": 1e-9}
    output = train(tiny_checkpoint("qwen3_vl"), tmp_path / "best", registry, **settings)
    losses = history(output, "eval_loss")
    best = 2 * (losses.index(min(losses)) + 1)
    assert f"checkpoint-{best}" in {path.name for path in output.glob("checkpoint-*")}
    assert equal_bits(output, output / f"checkpoint-{best}")
