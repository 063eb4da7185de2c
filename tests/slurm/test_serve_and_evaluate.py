"""The job that serves a folder and scores its answers, on a real SLURM; stock transformers stands in for vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.runs import REPOSITORY
from tests.slurm import cluster as slurm

SCRIPT = REPOSITORY / "scripts" / "slurm" / "serve_and_evaluate.sbatch"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not())),
]

Submit = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.start(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def submit(cluster: slurm.Cluster, registry: Path, tmp_path: Path) -> Submit:
    """Return a function of exports that runs a job; returns its exit code and what it printed."""

    def function(**exports: object) -> tuple[str, str]:
        exports = {"PYTHON": sys.executable, "HF_HUB_OFFLINE": 1, "OUTPUT_DIR": tmp_path / "scores", **exports}
        number = cluster.run(
            *("sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/job.log"),
            "--export=ALL," + ",".join(f"{name}={value}" for name, value in exports.items()),
            *(str(SCRIPT), "--dataset_registry", str(registry), "--max_new_tokens", "3"),
            cwd=REPOSITORY,
        )
        ended = cluster.wait_for(number, "FAILED", "COMPLETED", seconds=600)
        return ended["ExitCode"], (tmp_path / "job.log").read_text()

    return function


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    command = tmp_path / "vllm"
    command.write_text(f'#!/bin/sh\ncd {REPOSITORY} && exec {sys.executable} -m tests.slurm.stand_in_vllm "$@"\n')
    command.chmod(0o755)
    return command


def test_a_served_folder_is_scored_and_its_server_stopped(
    submit: Submit, vllm: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    code, log = submit(MODEL=tiny_checkpoint("qwen3_vl"), DATASETS="pictures", VLLM=vllm)
    assert code == "0:0", log
    scores = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert [one["dataset"] for one in scores["datasets"]] == ["pictures"]
    assert all(one["count"] > 0 and one["not_asked"] == 0 for one in scores["datasets"])
    running = [one.info["cmdline"] or () for one in psutil.process_iter(["cmdline"])]
    assert not [words for words in running if "tests.slurm.stand_in_vllm" in words]


def test_a_server_that_ends_and_missing_settings_end_the_job(
    submit: Submit, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen3_vl")
    code, log = submit(MODEL=folder, DATASETS="text", VLLM=tmp_path / "none")
    assert code == "3:0"
    assert "The server ended by itself (exit code 1)" in log and "There is no command" in log
    code, log = submit(DATASETS="text")
    assert code == "2:0" and "Name the folder and the datasets" in log
    code, log = submit(MODEL="/no/model", DATASETS="text")
    assert code == "2:0" and "/no/model does not exist" in log
