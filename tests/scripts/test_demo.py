"""The demo end to end with a few samples and steps, in the environment that runs the tests."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl.config import parse_arguments

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Make the demo take this Python for an environment that is up to date: nothing is installed."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    requirements = (REPOSITORY / "requirements.txt").read_bytes()
    stamp = subprocess.run(["cksum"], input=requirements, capture_output=True, check=True).stdout
    (venv / ".stamp-runtime").write_bytes(stamp)
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**keep, "VENV": str(venv), "DEMO_DIR": str(tmp_path / "my demo"), "DEMO_LIMIT": "6", "OMP_NUM_THREADS": "1"}


def run(
    environment: dict[str, str], cwd: Path, *flags: str, script: str = "demo.sh"
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPOSITORY / "scripts" / script), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_demo_runs_and_a_second_run_reuses_what_exists(tmp_path: Path, environment: dict[str, str]) -> None:
    flags = ("--max_steps", "3", "--per_device_train_batch_size", "4", "--logging_steps", "1")
    first = run(environment, tmp_path, *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    demo = tmp_path / "my demo"
    answers = [json.loads(line) for line in (demo / "report.jsonl").read_text().splitlines()]
    assert {answer["task"] for answer in answers} == {"digits", "comparisons", "grounding", "motion"}
    history = json.loads((demo / "model" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 3
    assert any("eval_loss" in entry for entry in history)
    assert "</html>" in (demo / "report.html").read_text()
    assert "prediction" in first.stdout and "accuracy" in first.stdout

    (served,) = [line for line in first.stderr.splitlines() if "to serve it with vLLM: " in line]
    command = shlex.split(served.partition("vLLM: ")[2])
    assert command == ["bash", str(REPOSITORY / "scripts" / "serve.sh"), str(demo / "model")]
    printed = subprocess.run(
        command, env=environment | {"DRY_RUN": "1", "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert printed.returncode == 0 and shlex.split(printed.stdout)[:3] == ["vllm", "serve", str(demo / "model")]

    weights = demo / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    second = run(environment, tmp_path, *flags)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "trained already" in second.stderr
    assert weights.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_thinking_demo_asks_one_model_both_ways(tmp_path: Path, environment: dict[str, str]) -> None:
    """At full length its model is right in 83% without a thought and in 94% with one."""
    flags = ("--max_steps", "2", "--per_device_train_batch_size", "4")
    done = run(environment | {"COUNT": "60"}, tmp_path, *flags, script="demo_thinking.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("plain", "thinking"):
        scores = json.loads((tmp_path / "my demo" / f"thinking_{kind}" / "evaluation.json").read_text())
        assert [(one["dataset"], one["count"]) for one in scores["datasets"]] == [(f"demo_compare_{kind}_heldout", 3)]


def test_every_line_of_the_recipe_has_a_comment_and_is_valid(tmp_path: Path) -> None:
    recipe = REPOSITORY / "configs" / "demo.yaml"
    lines = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines
    assert [line for line in lines if "#" not in line] == []
    parsed = parse_arguments([str(recipe), "--model_name_or_path", "m", "--output_dir", str(tmp_path), "--use_cpu"])
    assert parsed.data.data_flatten
