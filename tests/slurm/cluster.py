"""A SLURM cluster of one or more nodes in a folder: the real daemons, started as ordinary processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

CREDENTIALS = 15
"""Seconds in which a job has to be started on its nodes, some of which a busy machine needs; and for which one that was
requeued waits, as its nodes refuse it until its first credentials are void."""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")


def why_not() -> str | None:
    """Return why no cluster can be started here; None if one can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd needs root"


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Args:
        folder: its files.
        environment: with which its commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a SLURM command; return what it prints."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for(self, job: str, *states: str, seconds: float = 200) -> dict[str, str]:
        """Wait until a job is in one of the states; return what is known of it."""
        deadline = time.monotonic() + seconds
        while (found := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{found}\n{self.logs()}"
            time.sleep(0.2)
        return found

    def nodes_of(self, job: str) -> list[str]:
        """Return the nodes on which a job runs, or ran last."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def cut_power(self, node: str) -> None:
        """End a node's daemon and all that it started, as when the machine loses its power."""
        marks = {f"SLURM_CONF={self.folder}/slurm.conf", f"SLURMD_NODENAME={node}"}
        while found := [process for process in psutil.process_iter() if marks <= _environment_of(process)]:
            # slurmstepd has overwritten its environment; first of all, as it would report how its tasks ended.
            parents = {parent for process in found if (parent := process.parent()) and parent.name() == "slurmstepd"}
            for process in (*parents, *found):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))


def _environment_of(process: psutil.Process) -> set[str]:
    try:
        return {f"{name}={value}" for name, value in process.environ().items()}
    except psutil.Error:  # it ended meanwhile
        return set()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def _configuration(folder: Path, nodes: list[str]) -> str:
    name = socket.gethostname().split(".")[0]
    machine = f"NodeHostname={name} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN"
    lines = "\n".join(f"NodeName={node} Port={_free_port()} {machine}" for node in nodes)
    return f"""
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={_free_port()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={CREDENTIALS}
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdTimeout=10
JobRequeue=0
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
{lines}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=off MaxTime=INFINITE State=UP
"""


@contextmanager
def start(folder: Path, nodes: int = 1) -> Iterator[Cluster]:
    """Start the daemons and stop them afterwards; the nodes' names are addresses of this machine."""
    names = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
    for name in ("state", "munge"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder, names))
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--{kind}-file={folder}/munge/{kind}" for kind in ("pid", "seed")] + [f"--log-file={folder}/munge.log"]
    commands = [munged, ["slurmctld", "-D", "-i"], *(["slurmd", "-D", "-N", name] for name in names)]
    with ExitStack() as stack:
        for command in commands:
            output = stack.enter_context((folder / f"{command[0]}.out.log").open("ab"))
            settings = environment | ({"SLURMD_NODENAME": command[-1]} if command[0] == "slurmd" else {})
            process = subprocess.Popen(command, env=settings, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(0.5)
        cluster = Cluster(folder, environment)
        deadline = time.monotonic() + 60
        states = ("sinfo", "--noheader", "--Node", "--format=%t", "--partition=low")
        while cluster.run(*states).split() != ["idle"] * nodes:
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.2)
        yield cluster
