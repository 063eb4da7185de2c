"""The job script on a real SLURM: a job that has to stop saves, is requeued, and ends as if it had never stopped."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import REPOSITORY, equal_bits, flags, history
from tests.slurm import cluster as slurm

SCRIPTS = REPOSITORY / "scripts" / "slurm"
SETTINGS: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup",  # the recipe warms up
    "max_steps": 400,  # half a minute: a job must not end before it is signalled
    "save_strategy": "steps",
    "save_steps": 1000,
    "per_device_train_batch_size": 1,
    "dataloader_num_workers": 1,
    "eval_strategy": "no",
    "eval_dataset_use": "",
    "eval_generate": 0,
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
    """A training job of two ranks, or an array of such jobs."""

    def __init__(
        self,
        cluster: slurm.Cluster,
        model: Path,
        output: Path,
        registry: Path,
        runs: Path | None = None,
        nodes: int = 1,
        settings: dict[str, Any] = SETTINGS,
        **exports: Any,
    ) -> None:
        self.cluster, self.output = cluster, output
        recipe = REPOSITORY / "configs" / "demo.yaml"
        exports = {"RECIPE": recipe.stem, "OUTPUT_DIR": output, "NPROC_PER_NODE": 2, "HF_HUB_OFFLINE": 1, **exports}
        array = [] if runs is None else [f"--array=1-{len(runs.read_text().splitlines())}"]
        exports |= {} if runs is None else {"RUNS": runs}
        self.number = cluster.run(
            "sbatch",
            "--parsable",
            "--partition=low",
            *array,
            f"--nodes={nodes}",
            "--gpus-per-node=0",
            "--cpus-per-task=2",
            f"--output={output}.log",
            "--export=ALL," + ",".join(f"{name}={value}" for name, value in exports.items()),
            str(SCRIPTS / ("sft.sbatch" if runs is None else "sft_array.sbatch")),
            *flags(model, output, registry, **settings, **({} if runs is None else {"output_dir": None})),
            cwd=REPOSITORY,
        )

    def log(self) -> str:
        files = [self.output.with_name(f"{self.output.name}.log"), *self.output.glob("**/logs/*")]
        return "\n".join(file.read_text() for file in files if file.exists())

    def wait_until(self, moment: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < deadline, f"{self.cluster.job(self.number)}\n{self.log()}"
            time.sleep(0.1)

    def trains(self) -> bool:
        return ": loss " in self.log()

    def start_again(self, number: str) -> str:
        """Spare a requeued job the two minutes for which it waits; return the state it is in."""
        job = self.cluster.job(number)
        waited = datetime.now() - datetime.fromisoformat(job["SubmitTime"])  # since it was requeued
        startable = waited.total_seconds() > slurm.CREDENTIALS + 3
        if startable and job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
            # Without a look at the outcome: it may have started meanwhile.
            command = ["scontrol", "update", f"JobId={number}", "StartTime=now"]
            subprocess.run(command, env=self.cluster.environment, capture_output=True)
            time.sleep(1)
        return job["JobState"]

    def finish(self) -> None:
        """Wait for its end."""

        def ended() -> bool:
            state = self.start_again(self.number)
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
    assert "resumes from" in job.log()
    assert history(job.output) == history(whole)
    assert equal_bits(job.output, whole)


@pytest.mark.long
@pytest.mark.parametrize("lost", [1, 0], ids=["other node", "script's node"])
def test_job_of_two_nodes_goes_on_by_itself_on_others_after_one_failed(
    lost: int, whole: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "slurm").mkdir()
    with slurm.start(tmp_path / "slurm", nodes=3) as cluster:
        model, often = tiny_checkpoint("qwen3_vl"), SETTINGS | {"save_steps": 20}
        job = Job(cluster, model, tmp_path / "run", registry, nodes=2, settings=often, NPROC_PER_NODE=1)
        job.wait_until((job.output / "checkpoint-20").exists)
        node = cluster.nodes_of(job.number)[lost]
        cluster.cut_power(node)
        job.wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", seconds=120)
        job.finish()
        assert node not in cluster.nodes_of(job.number)
    assert "resumes from" in job.log()
    assert history(job.output) == history(whole)
    assert equal_bits(job.output, whole)


def test_each_run_of_an_array_has_its_flags_and_goes_on_by_itself(
    whole: Path, cluster: slurm.Cluster, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs.txt"
    runs.write_text("--run_name 'the whole one'\n--learning_rate 5e-4 --max_steps 2\n")
    job = Job(cluster, tiny_checkpoint("qwen3_vl"), tmp_path / "runs", registry, runs)
    first, second = f"{job.number}_1", f"{job.number}_2"
    job.wait_until(job.trains)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    job.wait_until(lambda: cluster.job(first)["Restarts"] == "1")
    for number in (second, first):
        job.wait_until(lambda number=number: job.start_again(number) == "COMPLETED")  # type: ignore[misc]
    assert equal_bits(job.output / "run-1", whole)
    assert history(job.output / "run-1") == history(whole)
    assert "run_name: the whole one" in (job.output / "run-1" / "training_args.yaml").read_text()
    state = json.loads((job.output / "run-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert "learning_rate: 0.0005" in (job.output / "run-2" / "training_args.yaml").read_text()


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        ({"RECIPE": "sft_qwen9"}, "configs/sft_qwen9.yaml does not exist"),
        ({"MODEL": "/no/model"}, "/no/model/config.json"),
    ],
)
def test_wrong_path_ends_the_job_before_anything_starts(
    cluster: slurm.Cluster, registry: Path, tmp_path: Path, exports: dict[str, Any], message: str
) -> None:
    job = Job(cluster, Path("no-model"), tmp_path / "run", registry, **exports)
    assert cluster.wait_for(job.number, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert message in job.log() and not job.output.exists()
