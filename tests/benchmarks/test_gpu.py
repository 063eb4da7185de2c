"""``benchmarks/gpu.py``: its rehearsal on the CPU, and its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import PARTS, at_once, wait_for
from benchmarks.gpu_parts.base import Part, Place
from benchmarks.gpu_parts.verdict import as_markdown, ratios, verdicts

REPOSITORY = Path(__file__).resolve().parents[2]
H100 = "NVIDIA H100 80GB HBM3"


def run(output: Path, *arguments: str, packages: Path | None = None) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--rehearse", "--output", str(output)]
    environment = os.environ | ({"PYTHONPATH": str(packages)} if packages else {})
    done = subprocess.run(
        [*command, "--work", str(output / "work"), *arguments], capture_output=True, text=True, env=environment
    )
    assert (output / "report.json").exists(), done.stderr
    return done.returncode, json.loads((output / "report.json").read_text())


@pytest.mark.slow
def test_the_cheap_parts_are_rehearsed_and_an_error_is_written_down(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "sitecustomize.py").write_text(f"open({str(tmp_path / 'started')!r}, 'a').write('one\\n')\n")
    code, report = run(tmp_path, "--part", "equality", "attention", "methods", packages=packages)
    assert len((tmp_path / "started").read_text().split()) > 7, "packages of PYTHONPATH are found in each item"
    items = report["items"]
    assert {name: row["status"] for name, row in items.items()} == {
        "equality/qwen3_vl": "done",
        "equality/qwen2_5_vl": "done",
        "methods/bf16": "done",
        "methods/LoRA": "done",
        "methods/QLoRA": "skipped",
        "attention/4 samples": "done",
        "attention/64 images": "done",
    }
    assert code == 0
    assert items["equality/qwen3_vl"]["gradient_difference"] == 0
    registry = tmp_path / "work" / "data" / "tiny" / "registry.py"
    registry.write_text("data_dict = 1\n")
    code, report = run(tmp_path, "--part", "methods")
    assert code == 1
    assert report["items"]["methods/LoRA"]["status"] == "failed"
    assert "data_dict" in report["items"]["methods/LoRA"]["error"]
    assert report["items"]["equality/qwen3_vl"]["status"] == "done", "what was done stays"
    assert "| methods | LoRA | failed | " in (tmp_path / "report.md").read_text()


def test_what_is_done_is_not_run_again_and_no_item_starts_after_the_time(tmp_path: Path) -> None:
    done = {"doctor/machine": {"status": "done", "passed": True, "seconds": 1.0}}
    (tmp_path / "state.json").write_text(json.dumps(done))
    code, report = run(tmp_path, "--minutes", "0")
    assert code == 0
    assert report["items"] == done


def test_targets_are_met_missed_or_not_measured() -> None:
    measured = {"tokens_a_second": 9500, "trained_tokens_a_second": 2000, "peak_gib": 60.0, "mfu": 0.49}
    stock = {"trained_tokens_a_second": 900, "peak_gib": 99.0}
    items = {
        "equality/qwen3_vl": {"status": "done", "passed": True, "seconds": 1},
        "equality/qwen3_5": {"status": "failed", "error": "one | two", "seconds": 1},
        "methods/QLoRA": {"status": "skipped", "skipped": "bitsandbytes is not installed", "seconds": 1},
        "step/8b ours": {"status": "done", "seconds": 1, **measured},
        "step/8b ours text": {"status": "done", "seconds": 1, "mfu": 0.5},
        "step/8b plain": {"status": "done", "seconds": 1, **stock},
        "train/2b": {"status": "done", "seconds": 1, "peak_over_predicted": 0.85},
        "train/8b": {"status": "done", "seconds": 1, "peak_over_predicted": 1.09},
    }
    found = {target: (value, said) for target, value, said in verdicts(items, H100)}
    assert found["CPU and GPU agree in float32 within 1e-3, each family"] == ("1 of 2", "missed")
    assert found["every installed method trains"] == ("", "not measured")
    assert found["8B, packs of 8k, all parts: MFU at least 0.5"] == ("0.49", "missed")
    assert found["8B: at least 9,400 tokens/s (9,400 on an H100)"][1] == "met"
    assert found["4B: at least 15,800 tokens/s (15,800 on an H100)"][1] == "not measured"
    assert found["image mixtures reach 0.9 of the MFU of text"] == ("0.98", "met")
    assert found["8B: at least 2 x the stock path's trained tokens/s"] == ("2.22", "met")
    assert found["8B: at most 0.6 x the stock path's peak memory"] == ("0.606", "missed")
    assert found["2b: dry run within 0.1 of the measured peak"][1] == "missed"
    assert found["8b: dry run within 0.1 of the measured peak"][1] == "met"
    other = [target for target, *_ in verdicts(items, "NVIDIA A100-SXM4-80GB")]
    assert "8B: at least 2,964 tokens/s (9,400 on an H100)" in other
    assert ratios(items) == {
        "8B: trained tokens/s, ours over stock path": 2.222,
        "8B: peak memory, ours over stock path": 0.606,
    }
    report = {"machine": {"device": H100}, "verdicts": [], "ratios": ratios(items), "items": items}
    page = as_markdown(report)
    assert "| equality | qwen3_5 | failed | one \\| two | 1 |" in page
    assert "| 8B: peak memory, ours over stock path | 0.606 |" in page


def test_an_item_that_the_end_of_the_call_stops_is_left_for_the_next(tmp_path: Path) -> None:
    place = Place(tmp_path, rehearsal=True)
    assert at_once(place, ["attention/4 samples", "attention/64 images"], time.monotonic()) == [None, None]
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    stuck = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    now = time.monotonic()
    row = wait_for(stuck, limit=0.1, started=now, ends=now + 60)
    assert row is not None and row["error"] == "stopped after its limit of 0.1 s"
    assert stuck.poll() is not None


def test_the_first_item_of_a_part_runs_alone_and_others_on_four_cores_each() -> None:
    part = Part(("plain", *"abcde"), lambda place, item: {}, together=4)
    assert part.groups([*part.items], 16) == [["plain"], ["a", "b", "c", "d"], ["e"]]
    assert part.groups(["b", "c", "d"], 9) == [["b", "c"], ["d"]]
    assert part.groups(["plain", "c"], 2) == [["plain"], ["c"]]
    assert part.groups([], 16) == []
    assert all(rows.together == 1 for name, rows in PARTS.items() if name in ("attention", "step", "train"))
