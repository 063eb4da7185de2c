"""Counting in real processes: killed, several at a time, on several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.packing.length_cache import RECORD
from qwenvl.data.packing.lengths import measure_lengths
from tests.data.counting import encoder_of, table_of, talk
from tests.e2e.runs import REPOSITORY, torchrun

ROWS = 1200
RECORDS: list[Any] = [talk("Q" * (n % 9) + "?", "It. " * (n % 11 + 1), id=str(n)) for n in range(ROWS)]

SLOWLY = """
import sys, time
from pathlib import Path
from tests.data.packing.test_counting_runs import SampleEncoder, measure_lengths, open_records

measure, last = SampleEncoder.measure, float(sys.argv[3])  # seconds


def slowly(self, sample):
    time.sleep(last if sample.record["id"] == "1199" else 0.002)
    return measure(self, sample)


SampleEncoder.measure = slowly
measure_lengths(open_records(Path(sys.argv[1])), Path(sys.argv[2]), workers=2)
"""

ON_RANKS = """
import logging, os, sys
from pathlib import Path
import torch.distributed as dist
from qwenvl.utils.errors import SampleError
from tests.data.packing.test_counting_runs import RECORDS, SampleEncoder, measure_lengths, open_records



def say(line):
    os.write(1, (line + chr(10)).encode())  # at once: the other rank writes to the same pipe


dist.init_process_group("gloo")
rank, counted = dist.get_rank(), []
measure = SampleEncoder.measure
SampleEncoder.measure = lambda self, sample: counted.append(1) or measure(self, sample)
checkpoint, cache = Path(sys.argv[1]), Path(sys.argv[2])
measured = measure_lengths(open_records(checkpoint, RECORDS[:50]), cache, workers=0)
total = int(measured.measures["tokens"].sum())
say(f"rank {rank} counted {len(counted)} and has {total} of {len(measured.measures)}")
try:
    measure_lengths(open_records(checkpoint, [*RECORDS[:50], "no record"]), cache, workers=0)
except SampleError as error:
    say(f"rank {rank} stops at row {error.origin.line}")
"""


def open_records(checkpoint: Path, records: list[Any] = RECORDS) -> ConversationDataset:
    return ConversationDataset([table_of(records, checkpoint)], encoder_of(checkpoint))


def start(script: Path, checkpoint: Path, cache: Path, last: float) -> subprocess.Popen[bytes]:
    script.write_text(SLOWLY)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(checkpoint), str(cache), str(last)]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, start_new_session=True)


def kept(cache: Path) -> int:
    """Return how many rows are on disk."""
    files = list(cache.glob("lengths/*"))
    return int((np.fromfile(files[0], RECORD)["check"] != 0).sum()) if files else 0


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_where_it_stopped(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, cache = tiny_checkpoint("qwen3_vl"), tmp_path / "cache"
    with start(tmp_path / "count.py", checkpoint, cache, last=6000) as process:
        try:
            deadline = time.monotonic() + 900
            while kept(cache) < ROWS // 4:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    before = kept(cache)
    assert ROWS // 4 <= before < ROWS
    counted: list[object] = []
    measure = SampleEncoder.measure
    monkeypatch.setattr(SampleEncoder, "measure", lambda self, s: counted.append(s.origin) or measure(self, s))
    measured = measure_lengths(open_records(checkpoint), cache, workers=0)
    assert len(counted) == ROWS - before
    assert measured.measures.tolist() == measure_lengths(open_records(checkpoint), workers=0).measures.tolist()


@pytest.mark.slow
def test_runs_at_the_same_time_do_not_harm_each_other(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, cache = tiny_checkpoint("qwen3_vl"), tmp_path / "cache"
    scripts = tmp_path / "a.py", tmp_path / "b.py"
    one, other = (start(script, checkpoint, cache, last=0) for script in scripts)
    with one, other:
        assert (one.wait(900), other.wait(900)) == (0, 0)
    expected = measure_lengths(open_records(checkpoint), workers=0)
    monkeypatch.setattr(SampleEncoder, "measure", None)  # everything is known
    assert measure_lengths(open_records(checkpoint), cache, workers=0).measures.tolist() == expected.measures.tolist()


@pytest.mark.slow
def test_one_rank_counts_and_all_know(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("qwen3_vl")
    script = tmp_path / "ranks.py"
    script.write_text(ON_RANKS)
    printed = torchrun(script, str(checkpoint), str(tmp_path / "cache"))
    total = int(measure_lengths(open_records(checkpoint, RECORDS[:50]), workers=0).measures["tokens"].sum())
    assert sorted(line for line in printed.splitlines() if line.startswith("rank ")) == [
        f"rank 0 counted 50 and has {total} of 50",
        "rank 0 stops at row 51",
        f"rank 1 counted 0 and has {total} of 50",
        "rank 1 stops at row 51",
    ]
