"""The tool that scores answers, and asks whether the model looks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenvl.cli.evaluate.command import main
from tests.cli.pages import Page
from tests.cli.predict.test_command import SMALL, lines, write_set

Evaluate = Callable[..., tuple[int, str, str]]
BOX = '{"bbox_2d": [100, 200, 300, 400]}'


@pytest.fixture
def evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Any
) -> Evaluate:
    """Function of flags, before which those of the output stand; those of a model as well where data are named."""
    monkeypatch.chdir(tmp_path)
    asking = ["--model_name_or_path", str(tiny_checkpoint("qwen3_vl")), "--device", "cpu", *SMALL]
    capsys.readouterr()

    def run(*flags: str) -> tuple[int, str, str]:
        code = main([*(asking if "--dataset_registry" in flags else []), "--output", "out", *flags])
        return code, *capsys.readouterr()

    return run


def write_predictions(folder: Path) -> str:
    """Ten digits, seven of them right, two boxes and one sample that could not be asked."""
    Image.new("RGB", (300, 200), "navy").save(folder / "a.png")
    picture = [["image", str(folder / "a.png")]]
    records: list[dict[str, Any]] = [
        {"question": "Which <b>digit</b>?", "expected": "7", "prediction": "7" if n < 7 else f"<i>{n}</i>", "index": n}
        for n in range(10)
    ]
    records = [{**record, "dataset": "digits", "media": picture, "line": n + 1} for n, record in enumerate(records)]
    records[8]["media"] = [["image", str(folder / "gone.png")]]
    records[9]["media"] = [["image", "embedded:12"], ["video", ["embedded:1", "embedded:2"]]]
    boxes = {"dataset": "boxes", "question": "Where?", "expected": BOX, "media": picture, "canvas": [1000, 1000]}
    records[0]["finish_reason"], records[9]["finish_reason"] = "stop", "length"
    records.append({**boxes, "prediction": "nowhere", "index": 10})
    records.append({**boxes, "prediction": BOX.replace("300", "200"), "index": 11})
    bad = {"dataset": "boxes", "question": "", "expected": "", "prediction": None, "error": "missing_file: gone"}
    records.append({**bad, "index": 12, "line": 3, "file": "f.jsonl"})
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_predictions_are_scored_by_dataset(evaluate: Evaluate, tmp_path: Path) -> None:
    code, printed, messages = evaluate("--predictions", write_predictions(tmp_path))
    assert (code, messages) == (1, "")
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    digits, boxes = record["datasets"]
    assert (digits["dataset"], digits["metric"], digits["count"]) == ("digits", "exact_match", 10)
    assert digits["score"]["value"] == 0.7 and 0.3 < digits["score"]["low"] < 0.6 < 0.8 < digits["score"]["high"] <= 1
    assert (boxes["metric"], boxes["count"], boxes["unreadable"], boxes["not_asked"]) == ("box_accuracy", 2, 1, 1)
    assert boxes["score"]["value"] == 0.5
    assert digits["cut"] == 1 and boxes["cut"] is None  # of boxes nobody said
    assert "1 answers were cut at --max_new_tokens" in printed
    for text in ("digits", "70.0%", "box accuracy at 0.5", "50.0%", "evaluation.html"):
        assert text in printed


def test_the_page_shows_the_worst_and_loads_nothing(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate("--predictions", write_predictions(tmp_path), "--worst", "2")
    source = (tmp_path / "out" / "evaluation.html").read_text()
    page = Page(source)
    assert page.open == []
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"@import|url\(|<script|<link|https?://", source)
    assert page.text.count("Which <b>digit</b>?") == 2  # two of three wrong ones; text is text
    assert "<i>7</i>" in page.text and "<i>8</i>" in page.text and "<i>9</i>" not in page.text
    assert "gone.png does not exist" in page.text
    assert "0.00, unreadable" in page.text
    assert "Cut" in page.text and "0.00, cut" not in page.text
    evaluate("--predictions", write_predictions(tmp_path), "--worst", "3")
    assert "0.00, cut" in Page((tmp_path / "out" / "evaluation.html").read_text()).text
    assert "missing_file: gone" in page.text and "f.jsonl:3" in page.text
    assert 'x="100" y="133.333" width="200" height="133.333"' in source  # of a picture of 3 : 2
    evaluate("--predictions", write_predictions(tmp_path))
    assert "image inside the annotations" in Page((tmp_path / "out" / "evaluation.html").read_text()).text


def test_metrics_may_be_named_by_flag_or_sample(evaluate: Evaluate, tmp_path: Path) -> None:
    path = Path(write_predictions(tmp_path))
    evaluate("--predictions", str(path), "--metric", "box_iou")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["datasets"]
    assert [one["metric"] for one in found] == ["box_iou", "box_iou"]
    assert found[1]["score"]["value"] == 0.25
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[7] |= {"metric": "anls", "prediction": "7", "accepted": ["8"]}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluate("--predictions", str(path))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["datasets"]
    assert [(one["metric"], one["count"]) for one in found] == [("exact_match", 9), ("anls", 1), ("box_accuracy", 2)]


def test_held_out_rows_with_thoughts_are_scored_by_their_answers(evaluate: Evaluate, tmp_path: Path) -> None:
    """As they are trained, ``<think>`` and an answer; the model's begins behind the tag that the prompt opened."""
    known = {"dataset": "think", "question": "Colour?", "expected": "<think>\nlook\n</think>\n\ngreen"}
    said = ["look\n</think>\n\ngreen", "<think>\nred?\n</think>\n\ngreen", "green\n</think>\n\nred", "green"]
    records = [{**known, "prediction": text, "index": n} for n, text in enumerate(said)]
    records[3] |= {"finish_reason": "length", "thought": "unfinished"}
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert evaluate("--predictions", "answers.jsonl")[0] == 0
    (found,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["datasets"]
    assert (found["metric"], found["score"]["value"], found["cut"]) == ("exact_match", 0.5, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--predictions", "none.jsonl"), "none.jsonl cannot be read"),
        (("--predictions", "empty.jsonl"), "holds no predictions"),
        (("--predictions", "bad.jsonl"), "bad.jsonl:2 is no prediction"),
        (("--predictions", "bad.jsonl", "--blind"), "leave out --blind"),
        (("--predictions", "bad.jsonl", "--metric", "bleuu"), "Did you mean 'bleu'"),
        ((), "--model_name_or_path is missing"),
    ],
)
def test_mistakes_are_one_message(flags: tuple[str, ...], message: str, evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"question": "", "expected": "", "prediction": ""}\n{}\n')
    code, _, messages = evaluate(*flags)
    assert code == 2
    assert message in messages
    assert messages.count("error:") == 1 and "Traceback" not in messages


def test_a_random_model_does_not_look(evaluate: Evaluate, tmp_path: Path) -> None:
    """Its loss is that of chance whatever it is shown; four pictures and one video, of which no other can stand in."""
    registry = str(write_set(tmp_path))
    flags = ("--dataset_registry", registry, "--dataset_use", "set", "--blind")
    code, printed, _ = evaluate(*flags)
    assert code == 1
    assert "set: No evidence that the answers depend on the images and videos: exact match is 0.0%" in printed
    assert "4 samples compared, 5 left out." in printed
    (found,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["blind"]
    assert found["losses"]["shown"]["value"] == pytest.approx(found["losses"]["blank"]["value"], rel=0.05)
    views = [lines(tmp_path / "out" / f"predictions{view}.jsonl") for view in ("", "_blank", "_swapped")]
    assert [len(view) for view in views] == [9, 9, 9]
    pictures = [[line for line in view if (line["id"] or "").startswith("picture")] for view in views]
    for shown, empty, swapped in zip(*pictures, strict=True):
        assert shown["trained_tokens"] == empty["trained_tokens"] == swapped["trained_tokens"]
        assert len({shown["loss"], empty["loss"], swapped["loss"]}) == 3
    assert [line["error"].partition(":")[0] for line in views[2] if "error" in line] == [
        *("missing_file", "no_partner", "bad_record", "no_media", "no_media")
    ]
    page = Page((tmp_path / "out" / "evaluation.html").read_text())
    assert page.open == [] and "Does the model look?" in page.text and "No evidence" in page.text
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.jsonl"))]
    assert evaluate(*flags)[1] == printed  # nothing is asked again
    assert before == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.jsonl"))]
