"""Two machines: two network namespaces joined by a cable, the launcher on each, the result of one machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.runs import REPOSITORY, flags, history, largest_difference

SETTINGS: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 1, "save_strategy": "no"}
LAUNCHER = REPOSITORY / "scripts" / "launch.sh"


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def remove_machine(name: str) -> None:
    """End what runs in a namespace, and remove it: it would live as long as they do."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for process in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    ip("netns", "delete", name)


def remove_stale_machines() -> None:
    """Remove the namespaces of tests that were killed themselves: their names say of which process they were."""
    for name in (line.split()[0] for line in ip("netns", "list").splitlines()):
        owner = re.fullmatch(r"qwenvl-(\d+)-[01]", name)
        if owner and not psutil.pid_exists(int(owner[1])):
            remove_machine(name)


@contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Make two namespaces that see each other as 10.77.0.1 and 10.77.0.2, and nothing else.

    Raises:
        OSError: that is not allowed here, or there is no ``ip``.
    """
    names = tuple(f"qwenvl-{os.getpid()}-{number}" for number in (0, 1))
    remove_stale_machines()
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(remove_machine, name)
        ip("-netns", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-netns", name, "address", "add", f"10.77.0.{number}/24", "dev", "wire")
            for device in ("wire", "lo"):
                ip("-netns", name, "link", "set", device, "up")
        yield names


def environment(**settings: str) -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | settings


@pytest.mark.slow
def test_two_nodes_train_like_one(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path) -> None:
    command = [str(LAUNCHER), *flags(tiny_checkpoint("qwen3_vl"), tmp_path / "two", registry, **SETTINGS)]
    with ExitStack() as stack:
        try:
            machines = stack.enter_context(two_machines())
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        processes = []
        for number, machine in enumerate(machines):
            settings = {"NNODES": "2", "NODE_RANK": str(number), "NPROC_PER_NODE": "1"}
            settings |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29501", "GLOO_SOCKET_IFNAME": "wire"}
            log = stack.enter_context((tmp_path / f"node-{number}.log").open("wb"))
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", machine, *command],
                    env=environment(**settings),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        codes = [process.wait(timeout=900) for process in processes]
        logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("node-*.log")))
        assert codes == [0, 0], logs[-6000:]
    one = [str(LAUNCHER), *flags(tiny_checkpoint("qwen3_vl"), tmp_path / "one", registry, **SETTINGS)]
    done = subprocess.run(one, env=environment(NPROC_PER_NODE="2"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-5)
    assert largest_difference(tmp_path / "two", tmp_path / "one") < 1e-6
