from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.demo.losses import Losses, read_losses
from examples.demo.page import build_demo_page
from examples.demo.report import main
from examples.demo.results import Result, guess_rate, score
from qwenvl.cli.make_demo_data.command import make_demo_data
from tests.cli.pages import Page


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_demo_data(folder, limit=6)
    return folder


@pytest.fixture
def results(data: Path) -> list[Result]:
    """Four digits, two of them wrong, a box and a clip."""
    digits = sorted((data / "media" / "digits_heldout").iterdir())
    answers = ["1", "<b>&", "3", "4"]
    expected = ["1", "2", "3", "5"]
    made = [
        Result("digits", (str(path),), "Which?", want, got, want == got)
        for path, want, got in zip(digits, expected, answers, strict=False)
    ]
    box = '{"bbox_2d": [100, 200, 300, 400], "label": "x"}'
    square = str(data / "media" / "grounding_heldout" / "0000.png")
    clip = str(data / "media" / "motion_heldout" / "0000.mp4")
    return [
        *made,
        Result("grounding", (square,), "Where?", box, box, True),
        Result("motion", (clip,), "?", "up", "", False),
    ]


def test_the_page_holds_everything_and_loads_nothing(results: list[Result]) -> None:
    losses = Losses(train=((1, 6.0), (50, 0.5)), held_out=((50, 0.7),), seconds=90)
    source = build_demo_page(results, score(results), losses)
    page = Page(source)
    assert page.open == []
    assert len(page.links) == 4 + 1 + 4  # digits, the box's picture, frames of the clip
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"@import|url\(|<script|<link", source)
    assert "<b>" in page.text  # an answer is text, whatever it holds
    assert page.text.count("✓ right") == 3
    assert page.text.count("✗ wrong") == 3
    assert "50 steps (1.5 minutes)" in page.text
    assert "optimizer step" in page.text
    assert source.count('x="100" y="200" width="200" height="200"') == 4  # two boxes, each with a light rim


def test_wrong_answers_beyond_the_first_are_shown(results: list[Result]) -> None:
    page = Page(build_demo_page(results, score(results), Losses(), shown=1)).text
    assert "Wrong answers among the other 3 samples: 2, 1 of them here." in page
    assert "no record of its training" in page


def test_chance_by_hand() -> None:
    assert guess_rate(["a", "a", "b"]) == pytest.approx(2 / 6)  # of six ordered pairs, two are equal
    assert guess_rate(["a"]) == 0


def test_scores_by_hand(results: list[Result]) -> None:
    digits, grounding, motion = score(results)
    assert (digits.task, digits.right, digits.total, digits.accuracy, digits.chance) == ("digits", 2, 4, 0.5, 0)
    assert (grounding.accuracy, motion.accuracy) == (1, 0)


def test_losses_come_from_the_trainer_state(tmp_path: Path) -> None:
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": "2.5"},
        {"step": 2, "eval_loss": 2.7},
        {"step": 2, "train_runtime": 9},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_losses(tmp_path) == Losses(((1, 3.0), (2, 2.5)), ((2, 2.7),), 9)
    assert read_losses(tmp_path / "none") == Losses()


def test_the_command_answers_and_writes(
    data: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "report.html"
    arguments = [
        "--model",
        str(tiny_checkpoint("qwen3_vl")),
        "--data",
        str(data),
        "--output",
        str(page),
        "--limit",
        "2",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "digits_heldout" in printed and "prediction" in printed and "accuracy" in printed
    lines = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == [
        task for task in ("digits", "comparisons", "grounding", "motion") for _ in "ab"
    ]
    assert Page(page.read_text()).open == []


def test_a_folder_without_samples_is_one_message(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model",
        str(tiny_checkpoint("qwen3_vl")),
        "--data",
        str(tmp_path),
        "--output",
        str(tmp_path / "r.html"),
    ]
    assert main(arguments) == 1
    assert "make_demo_data.py" in capsys.readouterr().err
