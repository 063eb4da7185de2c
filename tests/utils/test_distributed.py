from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from qwenvl.utils import distributed
from qwenvl.utils.errors import UserError


def test_alone() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main_process()
    assert distributed.gather_objects("mine") == ["mine"]


def test_before_the_process_group_exists_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.world_size()) == (5, 8)
    assert not distributed.is_main_process()


def test_a_world_size_without_a_rank_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.world_size() == 1


def one_rank(folder: Path) -> tuple[int, int, int, bool]:
    from qwenvl.config import parse_arguments

    flags = f"--model_name_or_path m --dataset_use a --output_dir {folder} --tune_mm_llm --use_cpu"
    training = parse_arguments(flags.split()).training  # this joins the process group
    assert distributed.is_initialized()
    gathered = distributed.gather_objects({"of": distributed.rank()})
    return distributed.rank(), distributed.world_size(), training.world_size, gathered == [{"of": 0}, {"of": 1}]


def one_waiting_rank() -> tuple[int, list[object]]:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    got: list[object] = [distributed.from_main_process(partial(slow, seconds)) for seconds in (22.0, 0.0)]
    if distributed.rank() == 1:
        time.sleep(22)
    distributed.wait_for_all()
    try:
        distributed.from_main_process(mistaken)
    except UserError as error:
        got.append(str(error))
    return distributed.rank(), got


def one_of_two_fails() -> tuple[int, list[str]]:
    """Process 0 fails in the first turn, process 1 in the second; the other one is told."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    met: list[str] = []
    distributed.wait_for_all()
    try:
        if distributed.rank() == 1:
            distributed.wait_for_all()
        distributed.from_main_process(broken)
    except (KeyError, torch.distributed.DistNetworkError) as error:
        met.append(f"{type(error).__name__}, lost contact: {distributed.lost_contact(error)}")
        distributed.report_failure()
    return distributed.rank(), met


def broken() -> None:
    raise KeyError


def slow(seconds: float) -> int:
    time.sleep(seconds)
    return distributed.rank() + 7


def mistaken() -> None:
    raise UserError("a mistake")


def as_a_rank(rank: int, port: int, results: Queue[Any], function: Callable[..., Any], *arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results.put(function(*arguments))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_two_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a function returns in two forked processes of one job, sorted."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    results: Queue[Any] = context.Queue()
    children = [
        context.Process(target=as_a_rank, args=(rank, port, results, function, *arguments)) for rank in range(2)
    ]
    for child in children:
        child.start()
    try:
        return sorted(results.get(timeout=900) for _ in children)
    finally:
        for child in children:
            child.join(900)
            child.kill()


def test_two_ranks_on_the_cpu(tmp_path: Path) -> None:
    """Arguments join the process group, so that two processes on a CPU know of each other, and of what each has."""
    import qwenvl.config  # noqa: F401  # so that the children need not import it

    assert on_two_ranks(one_rank, tmp_path) == [(0, 2, 2, True), (1, 2, 2, True)]


def test_the_others_wait_for_process_0_as_long_as_it_takes() -> None:
    """Longer than a collective operation may take, and once more; a mistake of the user is one of all."""
    assert on_two_ranks(one_waiting_rank) == [(rank, [7, 7, "a mistake"]) for rank in range(2)]


def test_who_waits_for_a_process_that_fails_is_told() -> None:
    assert on_two_ranks(one_of_two_fails) == [
        (0, ["KeyError, lost contact: False"]),
        (1, ["DistNetworkError, lost contact: True"]),
    ]


def test_one_of_all_is_the_first_to_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.is_first_to_say("x")
    assert distributed.is_first_to_say("x")  # alone, there is nobody who could have said it
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", server.port)):
        monkeypatch.setenv(name, str(value))
    assert [distributed.is_first_to_say(what) for what in ("x", "x", "y", "x")] == [True, False, True, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.is_first_to_say("x")


def test_the_store_of_torchrun_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine it answers late, and what all ranks know would be said by each of them."""
    settings = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**settings, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor() as pool:
        answers = pool.map(distributed.is_first_to_say, ["x", "x"])
        time.sleep(7)  # longer than any other store is waited for
        server = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
        assert sorted(answers) == [False, True]
    del server


def test_where_nobody_can_be_asked_everyone_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    assert distributed.is_first_to_say("x")
    monkeypatch.delenv("MASTER_ADDR")
    assert distributed.is_first_to_say("x")


PROGRAM = """
import atexit, os, sys
from qwenvl.utils.distributed import run_program

class TakenApart:
    def __del__(self, write=os.write):
        write(2, b"taken apart")  # streams are closed by then

def main():
    global kept
    kept = TakenApart()
    atexit.register(lambda: sys.stdout.write("tracker finished"))  # not flushed
    {ending}

run_program(main)
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [("return 0", 0), ("return 75", 75), ("sys.exit(2)", 2), ("sys.exit()", 0), ("raise KeyError('x')", 1)],
)
@pytest.mark.parametrize("launched", [False, True])
def test_a_launched_program_ends_with_its_code_and_is_not_taken_apart(ending: str, code: int, launched: bool) -> None:
    """Threads of the process group would abort it while Python ends; experiment trackers still finish."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{ending}", ending)],
        env=environment | ({"RANK": "0"} if launched else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "tracker finished"), done.stderr
    assert ("taken apart" in done.stderr) is not launched
    assert ("KeyError" in done.stderr) is (code == 1)
