"""``report.html``: what a run did, on one page that opens from its folder, for every kind of run."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.evaluate.answer_log import AnswerLog
from qwenvl.train import run as setup
from qwenvl.train.train_qwen import main
from qwenvl.train.trainer import Trainer
from tests.browser import dom, needs_chromium
from tests.cli.pages import Page
from tests.e2e.runs import LORA, flags, history, train
from tests.train.callbacks.test_nonfinite_guard import Fault

ASKING = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_dataset_use": "held_out",
    "eval_generate": 4,
    "eval_generate_tokens": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "vision_tower_lr": 1e-5,
    "device_peak_tflops": 0.1,
    "hub_token": "secret-word",
}


def read(folder: Path) -> tuple[str, Page]:
    """Return a report, whose tags are closed and which loads nothing."""
    source = (folder / "report.html").read_text()
    page = Page(source)
    assert page.open == []
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"@import|url\(|<script|<link|https?:", source)
    return source, page


def titles(source: str) -> list[str]:
    """Return the titles of the curves."""
    return re.findall(r"<figcaption>(.*?) <span", source)


@pytest.fixture(scope="module")
def asked(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that asks samples at two evaluations, and leaves two samples out."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    return train(tiny_checkpoint("qwen3_vl"), folder, registry, **ASKING, model_max_length=95)


def test_report_shows_curves_answers_data_and_settings(asked: Path) -> None:
    source, page = read(asked)
    assert "Finished after 4 steps." in page.text
    assert titles(source) == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Tokens",
        "Samples",
        "Model FLOPs utilization",
        "Waiting for data",
        "Padding",
        "Scores",
    ]
    losses, evaluated = history(asked), history(asked, "eval_loss")
    assert f"<title>step 4\ntraining: {losses[-1]:.3g}\nevaluation: {evaluated[-1]:.3g}</title>" in source
    assert "vision: 1e-5 throughout; merger: 0.001 throughout; language: 0.001 throughout" in page.text
    assert source.count('<article class="card learned">') == 3
    assert page.text.count("step 2") >= 3 and "Sample 101: what is here?" in page.text
    assert len(re.findall(r'<img alt="(?:image|video)', source)) >= 3
    assert "left out: longer than --model_max_length" in page.text and "bad_samples.jsonl" in page.text
    left_out = [json.loads(line) for line in (asked / "bad_samples.jsonl").read_text().splitlines()]
    assert left_out and all(f"{one['file']}:{one['line']}" in page.text for one in left_out)
    assert "--vision_tower_lr 1e-05" in page.text and "transformers 5." in page.text and "1 x cpu" in page.text
    assert "adam_beta2" in page.text and "secret-word" not in page.text
    assert not list(asked.glob(".report*"))


@needs_chromium
def test_a_browser_shows_the_report_without_complaints(asked: Path, tmp_path: Path) -> None:
    page = dom(asked / "report.html", "", tmp_path / "profile")
    assert page.tags.count("figure") == 9 and page.tags.count("article") == 3
    assert page.tags.count("polyline") >= 9 and page.tags.count("title") > 20


def test_answers_of_every_evaluation_are_kept(asked: Path) -> None:
    answers = AnswerLog(asked).read()
    assert Counter(one.step for one in answers) == {2: 3, 4: 3}
    assert all(one.line.expected and one.line.prediction is not None for one in answers)
    assert all(0 <= one.score <= 1 for one in answers) and any(one.score > 0 for one in answers)


def test_a_resumed_run_reports_like_one_that_was_never_stopped(
    asked: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Killed after the evaluation of step 4, half a line into its answers, and resumed from step 2."""
    shutil.copytree(asked / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    for name in ("eval_answers.jsonl", "bad_samples.jsonl"):
        shutil.copy(asked / name, tmp_path / "run" / name)
    with (tmp_path / "run" / "eval_answers.jsonl").open("a") as file:
        file.write('{"step": 4, "sco')
    resumed = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **ASKING, model_max_length=95)
    assert (resumed / "eval_answers.jsonl").read_text() == (asked / "eval_answers.jsonl").read_text()
    source, expected = read(resumed)[0], read(asked)[0]
    figures = [
        re.findall(rf"<title>step \d\n{name}: [^<]*", text) for text in (source, expected) for name in ("training",)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 4
    assert titles(source) == titles(expected)


def test_a_run_started_anew_forgets_the_answers_of_the_one_before(
    asked: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    shutil.copytree(asked, tmp_path / "run")
    settings = {**ASKING, "resume_from_checkpoint": "false", "max_steps": 2, "save_strategy": "no"}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    assert {one.step for one in AnswerLog(folder).read()} == {2}


def test_one_step_of_text_alone_makes_a_report(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=1, dataset_use="text", **LORA)
    source, page = read(folder)
    assert "Finished after 1 steps." not in page.text and "Finished after 1 step." in page.text
    assert "--eval_generate 100" in page.text and "No sample was left out" in page.text
    assert "Of these, in adapters" in page.text
    assert "evaluation:" not in page.text and "<polyline" not in source and "<circle" in source
    assert f"Report: {folder / 'report.html'}" in caplog.text


def test_skipped_steps_and_values_that_are_no_numbers_are_told(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(monkeypatch, range(2, 3), math.nan)
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=3, dataset_use="pictures")
    assert history(folder, "skipped_steps") == [1]
    source, page = read(folder)
    assert "1 step was skipped: its loss or gradient was not finite." in page.text
    assert "Step 2 is skipped: the loss is nan" in page.text and "1 value not finite" in page.text
    assert "<title>step 2\ntraining: nan" in source


def test_a_run_that_is_asked_to_stop_reports_how_far_it_came(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(setup, "Trainer", Stopped)
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path, registry, **{**ASKING, "eval_steps": 1, "max_steps": 8})
    assert main(command) == 75
    _, page = read(tmp_path)
    assert "Stopped on request after step 2 of 8" in page.text
    assert "The evaluation of step 2 is left out." in page.text


def test_a_report_that_cannot_be_written_costs_a_warning_alone(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report.html").mkdir(parents=True)
    (tmp_path / "report.html" / "mine").touch()
    train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, **{**ASKING, "save_strategy": "no", "eval_generate": 0})
    told = [one.getMessage() for one in caplog.records if "report.html" in one.getMessage()]
    assert len(told) == 1 and "could not be written; the run goes on" in told[0]
    assert [one.levelno for one in caplog.records if one.getMessage() == told[0]] == [logging.WARNING]
    assert [path.name for path in (tmp_path / "report.html").iterdir()] == ["mine"]
