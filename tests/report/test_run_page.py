"""The page of a run from its parts: text stays text, images are held once, and nothing makes it large."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl.evaluate.answer_log import FILE_NAME, Answered, AnswerLog
from qwenvl.metrics.predictions import Prediction
from qwenvl.models.trainable.freezing import ModuleSummary
from qwenvl.report.answers import STEPS, Medium, choose
from qwenvl.report.run_page import Data, Run, Setup, build_run_page
from tests.cli.pages import Page

HOSTILE = "<script>alert('1')</script> & \" ${title}"
SETUP = Setup(
    command=f"torchrun train.py --note '{HOSTILE}'",
    given={"learning_rate": "0.1"},
    settings={"learning_rate": "0.1", "seed": HOSTILE},
    versions={"torch": "2"},
    devices="2 x cpu, DDP",
    modules=[ModuleSummary("language", 5, 10, 0.1), ModuleSummary("vision", 0, 0)],
    adapters={"language": 5},
)
RUN = Run(f"Run {HOSTILE}", "Finished.", [], Data([("set", "training", 3, 4, None)]), SETUP)
BOX = '{"bbox_2d": [100, 200, 300, 400], "label": "x"}'


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8))


def line(index: int, dataset: str = "set", **values: object) -> Prediction:
    return replace(Prediction(index, dataset, "a.json", index + 1, question="Where?", expected="4"), **values)  # type: ignore[arg-type]


def full_run() -> Run:
    """Return a run with something in each section: every style of line, boxes, images, warnings, bad samples."""
    names = ("learning_rate_vision", "learning_rate_merger", "learning_rate_language", "learning_rate_head", "mfu")
    history = [
        {"step": step, "loss": 5.0 / step, **{name: place / step for place, name in enumerate(names)}}
        for step in range(1, 40)
    ]
    history += [{"step": 20, "eval_loss": 0.3, **{f"eval_score_{one}": 0.1 * one for one in range(7)}}]
    record = {"dataset": "set", "file": "a.json", "line": 1, "id": "x", "reason": "It is too long. " * 9}
    data = Data([("set", "training", 3, 4, 3)], [("set", "left out", 1)], [record], 1, "bad_samples.jsonl")
    answers = [
        Answered(step, line(place, expected=BOX, canvas=canvas, prediction=said), value)
        for step, said, value in ((1, BOX.replace("100", "150"), 0.0), (2, BOX, 1.0), (3, "half", 0.5))
        for place, canvas in enumerate(((1000, 1000), None))
    ]
    media = [Medium((noise(90),))]
    return replace(
        RUN, history=history, data=data, answers=answers, warnings=["Mind " * 30], open_media=lambda _: media
    )


def test_text_is_never_markup() -> None:
    record = {"dataset": HOSTILE, "file": HOSTILE, "line": 1, "id": HOSTILE, "reason": HOSTILE}
    data = Data([(HOSTILE, "training", 3, 4, None)], [(HOSTILE, "left out", 1)], [record], 1, "bad_samples.jsonl")
    asked = line(0, HOSTILE, question=HOSTILE, expected=HOSTILE, prediction=HOSTILE, id=HOSTILE)
    answers = [Answered(1, asked, 0.5)]
    history = [{"step": 1, HOSTILE: 1.0, "loss": 2.0}]
    run = replace(RUN, data=data, answers=answers, history=history, warnings=[HOSTILE], open_media=lambda _: HOSTILE)
    source = build_run_page(run)
    page = Page(source)
    assert page.open == [] and "<script" not in source
    assert page.text.count(HOSTILE) >= 12 and "50%" in page.text


def test_boxes_of_every_evaluation_are_drawn_over_one_copy_of_the_picture() -> None:
    boxed = line(0, expected=BOX, canvas=(1000, 1000))
    said = {1: "nothing", 2: BOX.replace("100", "150"), 3: BOX}
    answers = [Answered(step, replace(boxed, prediction=text), float(step == 3)) for step, text in said.items()]
    image = noise(300)
    source = build_run_page(replace(RUN, answers=answers, open_media=lambda _: [Medium((image,))]))
    page = Page(source)
    assert page.open == []
    assert source.count("data:image/jpeg") == 1 and source.count('<use href="#image-0"/>') == 2
    assert source.count('id="image-0"') == 1
    assert source.count('<rect class="expected-line" x="100" y="200" width="200" height="200"/>') == 3
    assert source.count('<rect class="answer-line" x="150" y="200" width="150" height="200"/>') == 1
    assert source.count('<rect class="answer-line" x="100" y="200" width="200" height="200"/>') == 1
    assert "100, 200, 300, 400" in page.text and page.text.count("✗ wrong") == 2


def test_many_samples_evaluations_pictures_and_events_stay_a_small_page() -> None:
    answers = [
        Answered(step, line(index, f"set {index % 3}", question="w " * 5000, prediction="x" * 5000), 0.0)
        for step in range(50)
        for index in range(40)
    ]
    record = {"dataset": "set", "file": "a.json", "line": 1, "id": None, "reason": "y" * 5000}
    data = Data([], [("set", "left out", 10**6)], [record] * 100, 10**6, "bad_samples.jsonl")
    video = Medium(tuple(noise(side) for side in range(500, 510)))
    history = [{"step": step, "loss": float(step), "learning_rate": 1.0} for step in range(5000)]
    warnings = [str(number) + "z" * 5000 for number in range(200)]
    run = replace(RUN, answers=answers, data=data, history=history, warnings=warnings, open_media=lambda _: [video] * 5)
    source = build_run_page(run)
    text = Page(source).text
    assert len(source) < 3 * 1024**2  # almost all of it noise as JPEG, the worst image there is
    assert len(re.sub('base64,[^"]*', "", source)) < 300_000
    assert "8 of 40 samples, 6 of 50 evaluations" in text and "and 1 more" in text
    assert "Samples that were left out: 30 of 1,000,000" in text and "And 170 more." in text
    assert source.count("step 49") == 8 and source.count("step 0<") == 8  # the first and the last


def test_shown_samples_come_from_each_dataset_and_stay_the_same() -> None:
    lines = [line(index, "large" if index < 90 else "small") for index in range(100)]
    chosen = choose(lines[::-1])
    assert [one.index for one in chosen] == [0, 1, 2, 3, 90, 91, 92, 93]
    assert choose(lines[:2]) == lines[:2]


def test_a_sample_of_another_time_is_shown_where_it_was_answered() -> None:
    """--eval_generate was changed on the way: a newer sample has no answer at the first evaluations."""
    answers = [Answered(step, line(0, prediction="4"), 1.0) for step in range(STEPS)]
    answers.append(Answered(STEPS - 1, line(7, prediction="5"), 0.0))
    source = build_run_page(replace(RUN, answers=answers))
    assert source.count('<li class="right">') == STEPS and source.count('<li class="wrong">') == 1


def test_a_run_without_anything_is_a_page_too() -> None:
    page = Page(build_run_page(RUN))
    assert page.open == []
    assert "Nothing has been logged yet" in page.text and "--eval_generate 100" in page.text


def test_the_log_of_answers_passes_over_what_is_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AnswerLog(tmp_path)
    assert log.read() == []
    for step in (1, 2, 3):
        log.add(step, [line(0, prediction="4"), line(1, prediction="\ud800")])
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('[1]\n{"step": 3, "sc')
    log.take_up(2)
    assert [(one.step, one.line.index, one.score) for one in log.read()] == [(1, 0, 1), (1, 1, 0), (2, 0, 1), (2, 1, 0)]
    assert [re.findall(r"jsonl:\d", record.getMessage()) for record in caplog.records] == [["jsonl:7"], ["jsonl:8"]]


def test_a_log_of_answers_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).mkdir()
    AnswerLog(tmp_path).add(7, [line(0, prediction="4")])
    assert "Cannot write the answers of step 7 to" in caplog.text
