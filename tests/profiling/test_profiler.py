"""The profile of a run: its table, its trace, and that it changes nothing."""

from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl.profiling.profile_table import LEFT_OUT, Operators, Profile, covered, format_profile, measure_operators
from qwenvl.profiling.profiler import Phase, PhaseClock
from tests.e2e.runs import equal_bits, history, train


def shares(table: str, first: str) -> dict[str, float]:
    """The shares of a table's rows, from one row to the next empty line, by name."""
    rows = table[table.index(f"\n{first}") + 1 :].split("\n\n")[0].splitlines()
    return {row[:64].strip(): float(row.split()[-1].rstrip("%")) for row in rows if row.endswith("%")}


def read_trace(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def ranges(events: list[dict[str, Any]]) -> Counter[str]:
    """How often each range that somebody named is in a trace."""
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_profile_says_where_the_time_of_its_steps_goes(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}
    settings |= {"eval_steps": 3, "eval_dataset_use": "held_out"}  # in the middle of what is profiled
    checkpoint = tiny_checkpoint("qwen3_vl")
    plain = train(checkpoint, tmp_path / "plain", registry, **settings)
    with caplog.at_level(logging.INFO, "qwenvl"):
        folder = train(checkpoint, tmp_path / "profiled", registry, profile_steps=2, **settings)
    table = (folder / "profile" / "table.txt").read_text()
    assert "steps 3 to 4 on cpu" in table
    assert table.strip() in caplog.text
    phases = shares(table, "waiting for data")
    assert list(phases) == [*(phase.value for phase in Phase), "whole step"]
    assert phases.pop("whole step") == 100
    assert sum(phases.values()) == pytest.approx(100, abs=0.4)
    assert all(share > 0 for share in phases.values())
    assert phases["backward"] > phases["clipping and optimizer"] > 0
    assert len(shares(table, "operator")) == 10
    found = ranges(read_trace(folder))
    batches = 2 + 1  # of steps 3 and 4: an epoch of eleven samples ends in the middle of one
    assert found[Phase.OPTIMIZER.value] == 2
    for phase in (Phase.VISION, Phase.LANGUAGE, Phase.LOSS, Phase.BACKWARD):
        assert found[phase.value] in (batches, batches + 1)
    assert found[Phase.DATA.value] >= batches
    assert found[LEFT_OUT] == 1
    assert equal_bits(folder, plain)
    assert history(folder) == history(plain)
    assert not (plain / "profile").exists()
    assert sorted(path.name for path in (folder / "profile").iterdir()) == ["table.txt", "trace.json.gz"]


def test_a_run_shorter_than_its_profile_is_profiled_whole(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=1, profile_steps=3, dataset_use="text")
    assert "Profile of step 1 on cpu" in (folder / "profile" / "table.txt").read_text()
    assert ranges(read_trace(folder))[Phase.OPTIMIZER.value] == 1


def test_phases_follow_each_other_without_a_gap() -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock = PhaseClock(torch.device("cpu"), lambda: next(times))
    for phase in (Phase.DATA, Phase.VISION, None, Phase.DATA, Phase.BACKWARD, Phase.OTHER):
        clock.enter(phase)
    seconds = clock.read()
    assert seconds == dict.fromkeys(Phase, 0.0) | {Phase.DATA: 5.0, Phase.VISION: 2.0, Phase.BACKWARD: 5.0}


def event(name: str, start: float, length: float, category: str = "cpu_op", thread: int = 1) -> dict[str, Any]:
    """An event of a trace; milliseconds."""
    times = {"ts": 1e3 * start, "dur": 1e3 * length}
    return {"ph": "X", "name": name, "cat": category, "pid": 1, "tid": thread, **times}


TRACE = {
    "traceEvents": [
        event("linear", 0, 10),
        event("addmm", 2, 6),
        event("copy", 3, 1),
        event("copy", 10, 2),
        event("linear", 5, 4, thread=2),
        event("backward", 0, 20, "user_annotation"),
        event(LEFT_OUT, 30, 10, "user_annotation"),
        event("linear", 31, 5),
        event("gemm", 4, 5, "kernel", 7),
        event("norm", 6, 4, "kernel", 8),
        event("Memcpy", 15, 1, "gpu_memcpy", 7),
        {"ph": "M", "name": "process_name"},
    ]
}


def test_operators_have_the_time_that_those_they_call_do_not() -> None:
    found = measure_operators(TRACE, on_device=False)
    assert found.seconds == pytest.approx({"linear": (10 - 6 + 4) / 1e3, "addmm": 5 / 1e3, "copy": 3 / 1e3})
    assert found.calls == {"linear": 2, "addmm": 1, "copy": 2}


def test_kernels_that_run_at_the_same_time_keep_a_gpu_busy_once() -> None:
    found = measure_operators(TRACE, on_device=True)
    assert found.seconds == pytest.approx({"gemm": 5 / 1e3, "norm": 4 / 1e3, "Memcpy": 1 / 1e3})
    assert found.busy == pytest.approx(7 / 1e3)
    assert covered([]) == 0


def test_the_table_of_a_gpu_says_how_long_kernels_ran() -> None:
    phases = dict.fromkeys(Phase, 0.0) | {Phase.BACKWARD: 0.03, Phase.OTHER: 0.01}
    kernels = Operators({f"kernel<{number}>": 1e-3 * number for number in range(12)}, Counter(), 0.03)
    kernels = Operators({**kernels.seconds, "k" * 99: 1.0}, Counter(), 0.03)
    table = format_profile(Profile(3, 4, "NVIDIA H200", phases, kernels, deepspeed=True))
    assert shares(table, "backward") == {
        "backward": 75.0,
        "clipping and optimizer": 0.0,
        Phase.OTHER.value: 25.0,
        "whole step": 100.0,
        "time in which kernels ran": 75.0,
    }
    assert len(shares(table, "kernel ")) == 10
    assert "k" * 60 + "... " in table
    assert "15.00" in table.split("backward", 1)[1].splitlines()[0]
    assert "DeepSpeed" in table
    assert max(map(len, table.splitlines())) <= 100
