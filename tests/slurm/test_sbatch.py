"""The job script on a real SLURM: a job that has to stop saves, is requeued, and ends as if it had never stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm import cluster as slurm
from tests.train.runs import REPOSITORY, equal_bits, flags, history

SCRIPT = REPOSITORY / "scripts" / "slurm" / "sft.sbatch"
SETTINGS: dict[str, Any] = {
    "max_steps": 60,
    "save_strategy": "steps",
    "save_steps": 1000,
    "per_device_train_batch_size": 1,
    "dataloader_num_workers": 1,
    "eval_strategy": "no",
    "eval_dataset_use": "",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not())),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.start(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Job:
    """A training job of two ranks."""

    def __init__(self, cluster: slurm.Cluster, model: Path, output: Path, registry: Path) -> None:
        self.cluster, self.output = cluster, output
        recipe = REPOSITORY / "configs" / "demo.yaml"
        exports = {"RECIPE": recipe.stem, "OUTPUT_DIR": output, "NPROC_PER_NODE": 2, "HF_HUB_OFFLINE": 1}
        self.number = cluster.run(
            "sbatch",
            "--parsable",
            "--partition=low",
            "--gpus-per-node=0",
            "--cpus-per-task=2",
            f"--output={output}.log",
            "--export=ALL," + ",".join(f"{name}={value}" for name, value in exports.items()),
            str(SCRIPT),
            *flags(model, output, registry, **SETTINGS),
            cwd=REPOSITORY,
        )

    def log(self) -> str:
        files = [self.output.with_name(f"{self.output.name}.log"), *self.output.glob("logs/*")]
        return "\n".join(file.read_text() for file in files if file.exists())

    def wait_until(self, moment: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < deadline, f"{self.cluster.job(self.number)}\n{self.log()}"
            time.sleep(0.1)

    def trains(self) -> bool:
        return "'loss'" in self.log()

    def finish(self) -> None:
        """Wait for its end; a requeued job waits two minutes unless it is told to start."""

        def ended() -> bool:
            state = self.cluster.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED", "REQUEUED", "PREEMPTED"), (
                f"{state} {self.log()}"
            )
            return state == "COMPLETED"

        self.wait_until(ended)


@pytest.fixture(scope="module")
def whole(
    cluster: slurm.Cluster,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A job that nothing stopped."""
    job = Job(cluster, tiny_checkpoint("qwen3_vl"), tmp_path_factory.mktemp("whole") / "run", registry)
    job.finish()
    return job.output


@pytest.mark.parametrize("reason", ["preempted", "time limit"])
def test_job_goes_on_by_itself(
    reason: str,
    whole: Path,
    cluster: slurm.Cluster,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
) -> None:
    job = Job(cluster, tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry)
    job.wait_until(job.trains)
    if reason == "preempted":
        cluster.run("sbatch", "--partition=high", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap=sleep 3")
    else:  # the signal that --signal=B:USR1@300 has SLURM send
        cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: cluster.job(job.number)["Restarts"] == "1")
    assert "Stopped on request after step" in job.log()
    assert not list(job.output.glob("*.safetensors"))
    job.finish()
    assert "Resuming from" in job.log()
    assert history(job.output) == history(whole)
    assert equal_bits(job.output, whole)
