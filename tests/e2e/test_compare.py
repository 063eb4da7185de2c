"""Runs side by side: differences of settings, data and versions, scores and curves, of finished and unfinished runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenvl.cli.compare_runs.command import main
from qwenvl.cli.compare_runs.records import read_runs
from qwenvl.report.compare_page import differences, results
from tests.e2e.runs import train


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs ``a``, ``b`` (other learning rate and data) and ``c`` (as b, stopped after a checkpoint)."""
    folder = tmp_path_factory.mktemp("runs")
    more = folder / "registry.py"
    more.write_text(registry.read_text())
    shared = {"max_steps": 3, "save_steps": 1, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1}
    shared |= {"eval_dataset_use": "held_out", "eval_generate": 4, "eval_generate_tokens": 4, "save_total_limit": 1}
    train(tiny_checkpoint("qwen3_vl"), folder / "a", more, learning_rate=1e-3, **shared)
    train(tiny_checkpoint("qwen3_vl"), folder / "b", more, learning_rate=1e-4, dataset_use="mixed%50,text", **shared)
    (folder / "c").mkdir()
    shutil.copytree(folder / "b" / "checkpoint-3", folder / "c" / "checkpoint-3")
    return folder


def test_what_differs(runs: Path) -> None:
    read = read_runs([str(runs / name) for name in "abc"])
    assert [run.name for run in read] == ["a", "b", "c"]
    found = {(kind, name): tuple(values) for kind, name, *values in differences(read)}
    assert set(found) == {
        ("setting", "learning_rate"),
        ("setting", "dataset_use"),
        ("data", "mixed, training"),
        ("data", "text, training"),
    }
    assert found["setting", "learning_rate"] == ("0.001", "0.0001", "0.0001")
    every, half, _ = found["data", "mixed, training"]
    assert every.startswith("11 of 11 rows, annotations ")
    assert half.replace("5 of", "6 of").startswith("6 of 11 rows, annotations ")
    assert every.split()[-1] == half.split()[-1]  # the same annotations
    assert found["data", "text, training"][0] == "-"


def test_changed_annotations_differ_by_their_hash(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    data = json.loads((tmp_path / "a" / "data.json").read_text())
    data[0]["fingerprint"] = "0123456789"
    (tmp_path / "a" / "data.json").write_text(json.dumps(data))
    (row,) = differences(read_runs([str(runs / "a"), str(tmp_path / "a")]))
    assert row[:2] == ("data", "mixed, training")
    assert row[3] == "11 of 11 rows, annotations 01234567"


def test_results_are_those_of_the_logs(runs: Path) -> None:
    evaluation = {"dataset": "held_out", "metric": "chrf", "score": {"value": 0.5, "low": 0.25, "high": 0.75}}
    (runs / "a" / "scored").mkdir(exist_ok=True)
    (runs / "a" / "scored" / "evaluation.json").write_text(json.dumps({"datasets": [evaluation]}))
    rows = {name: tuple(values) for name, *values in results(read_runs([str(runs / name) for name in "abc"]))}
    assert rows["optimizer steps"] == ("3", "3", "3")
    log = json.loads((runs / "a" / "trainer_state.json").read_text())["log_history"]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert rows["evaluation loss, last"][0] == f"{losses[-1]:.4g}"
    assert rows["evaluation loss, lowest"][0] == f"{min(losses):.4g} at step {losses.index(min(losses)) + 1}"
    assert rows["training loss, mean of the run"][2] == "-"  # unfinished
    assert rows["held_out, chrf"] == ("50.0% (25.0% to 75.0%)", "-", "-")
    (name,) = (name.split(", ")[1] for name in rows if name.endswith(", while training"))
    score = [line[f"eval_{name}"] for line in log if f"eval_{name}" in line][-1]
    assert rows[f"held_out, {name}, while training"][0].startswith(f"{score:.1%} (")


def test_command_and_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main([*(str(runs / name) for name in "ab"), "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate" in printed
    assert str(page) in printed
    text = page.read_text()
    assert "2 runs side by side" in text
    assert text.count("<figure") >= 4
    assert "eval_loss" in text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "Name at least two output folders"),
        (["a", "a"], "An output folder is named twice"),
        (["a", "none"], "is not the output of a training run"),
    ],
)
def test_what_is_no_run_is_said(
    runs: Path, names: list[str], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*(str(runs / name) for name in names), "--output", str(tmp_path / "page.html")]) == 2
    assert message in caplog.text
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("name", "content"), [("training_args.yaml", "seed: ["), ("trainer_state.json", "{")])
def test_a_damaged_record_is_named(
    runs: Path, name: str, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    assert main([str(runs / "b"), str(tmp_path / "a"), "--output", str(tmp_path / "page.html")]) == 2
    assert str(tmp_path / "a" / name) in caplog.text
