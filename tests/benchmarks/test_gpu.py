"""``benchmarks/gpu.py``: its rehearsal on the CPU, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_parts.verdict import as_markdown, verdicts

REPOSITORY = Path(__file__).resolve().parents[2]
H100 = "NVIDIA H100 80GB HBM3"


def run(output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--rehearse", "--output", str(output)]
    done = subprocess.run([*command, "--work", str(output / "work"), *arguments], capture_output=True, text=True)
    assert (output / "report.json").exists(), done.stderr
    return done.returncode, json.loads((output / "report.json").read_text())


@pytest.mark.slow
def test_the_cheap_parts_are_rehearsed_and_an_error_is_written_down(tmp_path: Path) -> None:
    code, report = run(tmp_path, "--part", "equality", "attention", "methods")
    items = report["items"]
    assert {name: row["status"] for name, row in items.items()} == {
        "equality/qwen3_vl": "done",
        "equality/qwen2_5_vl": "done",
        "methods/bf16": "done",
        "methods/LoRA": "done",
        "methods/QLoRA": "skipped",
        "attention/4 samples": "done",
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
    assert found["CPU and GPU agree in float32"] == ("1 of 2", "missed")
    assert found["every method trains"] == ("", "not measured")
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
    report = {"machine": {"device": H100}, "verdicts": [], "items": items}
    assert "| equality | qwen3_5 | failed | one \\| two | 1 |" in as_markdown(report)
