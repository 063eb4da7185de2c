"""The tools for masks: drawn data, a page of attention, and figures, from the demo's data to a trained folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.evaluate_masks import main as evaluate_masks
from qwenvl.cli.make_demo_data.drawing import COLOURS
from qwenvl.cli.make_mask_data import main as make_mask_data
from qwenvl.cli.predict.command import main as predict
from qwenvl.cli.show_attention.command import main as show_attention
from qwenvl.cli.show_attention.overlay import combine, heat, masked
from qwenvl.tasks.grounding.baselines import Baselines
from qwenvl.tasks.grounding.masks import mask_of, read_mask
from qwenvl.tasks.grounding.metrics import MaskRecord, compare_masks, mask_metrics
from qwenvl.train.train_qwen import main as train
from tests.cli.pages import Page

LIMITS = ("--max_pixels", "64*96", "--min_pixels", "32*32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    assert make_mask_data(["--output", str(folder), "--train", "6", "--heldout", "3"]) == 0
    entries = {
        name: {"annotation_path": str(folder / f"scenes_{name}.jsonl"), "data_path": str(folder)}
        for name in ("train", "heldout")
    }
    (folder / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the tools for a folder that has learned masks for two steps."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--model_name_or_path", str(tiny_checkpoint("qwen3_vl")), "--output_dir", str(folder)]
    flags += ["--dataset_registry", str(data / "registry.py"), "--dataset_use", "train", "--task", "grounding", *LIMITS]
    flags += [
        "--mask_channels",
        "2",
        "--mask_resolution",
        "8",
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
        "--verify_export",
        "False",
    ]
    assert train([*flags, "--report_to", "none", "--disable_tqdm", "True"]) == 0
    return ["--model_name_or_path", str(folder), "--dataset_registry", str(data / "registry.py"), *LIMITS]


def test_drawn_masks_are_where_their_colour_is(data: Path) -> None:
    records = [json.loads(line) for line in (data / "scenes_heldout.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        picture = np.asarray(Image.open(data / record["image"]))
        answer = record["conversations"][1]["value"]
        assert answer == " and ".join(mask["phrase"] for mask in record["masks"])
        for mask in record["masks"]:
            found = read_mask(mask["segmentation"], picture.shape[:2]).pixels()
            colour = COLOURS[mask["phrase"].split()[1]]
            assert np.array_equal(found, (picture == colour).all(-1))


def test_a_page_shows_where_phrases_look_and_the_masks(trained: list[str], tmp_path: Path) -> None:
    output = tmp_path / "attention.html"
    assert show_attention([*trained, "--dataset_use", "heldout", "--limit", "2", "--output", str(output)]) == 0
    page = Page(output.read_text())
    assert page.open == []
    assert all(link.startswith("data:image/") for link in page.links)
    layers = 3
    assert len(page.links) == 2 * 2 * (2 + layers)
    assert "layer 0" in page.text and f"layer {layers - 1}" in page.text and f"layer {layers}" not in page.text
    assert page.text.count("found (pink), annotated (green); IoU") == 4
    assert "% of the attention" in page.text


def test_any_picture_can_be_asked_about(trained: list[str], data: Path, tmp_path: Path, tiny_checkpoint: Any) -> None:
    """By an answer that is given, some layers and heads, and every token; or by the model's own answer."""
    picture, output = data / "media" / "scenes_train" / "0000.png", tmp_path / "attention.html"
    trained = ["--model_name_or_path", str(tiny_checkpoint("qwen3_vl")), *trained[2:]]
    asked = [*trained, "--image", str(picture), "--prompt", "What?", "--output", str(output)]
    chosen = ["--answer", "a red car", "--phrases", "red car", "--layers", "1,2", "--heads", "0", "--per_token", "True"]
    assert show_attention([*asked, *chosen]) == 0
    page = Page(output.read_text())
    tokens = len(page.links) - 1 - 2
    assert tokens >= 2 and "layer 1" in page.text and "layer 0" not in page.text and ": mask" not in page.text
    assert show_attention([*asked, "--max_new_tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--layers", "9"], "--layers 9: there are 0, 1, 2."),
        (["--heads", "x"], "--heads x: there are 0"),
        (["--phrases", "zebra"], "the phrase 'zebra' occurs in the answer 0 times"),
        (["--output", "/nowhere/a.html"], "--output /nowhere/a.html cannot be written"),
    ],
)
def test_mistakes_end_with_one_message(flags, expected, trained, capsys) -> None:
    assert show_attention([*trained, "--dataset_use", "heldout", "--limit", "1", *flags]) == 1
    assert expected in capsys.readouterr().err


def test_figures_stand_beside_masks_that_look_at_nothing(trained, tiny_checkpoint, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert evaluate_masks([*trained, "--dataset_use", "heldout", "--known_use", "train"]) == 0
    rows = capsys.readouterr().out
    for name in ("the whole image", "the mean box", "the mean mask", "mIoU"):
        assert name in rows
    plain = ["--model_name_or_path", str(tiny_checkpoint("qwen3_vl")), *trained[2:], "--dataset_use", "heldout"]
    assert evaluate_masks(plain) == 1
    assert "has not learned masks" in capsys.readouterr().err


def test_metrics_of_masks() -> None:
    records = [MaskRecord(6, 10, 8, 100), MaskRecord(0, 30, 10, 100)]
    assert mask_metrics(records) == pytest.approx({"miou": 0.3, "ciou": 6 / 40, "acc_at_50": 0.5, "miou_whole": 0.09})
    assert mask_metrics([]) == {}
    nothing = np.zeros((2, 2), dtype=bool)
    assert compare_masks(nothing, nothing).iou == 1


def test_baselines_know_where_masks_mostly_are() -> None:
    pixels = np.zeros((40, 80), dtype=bool)
    pixels[10:30, 20:60] = True
    found = Baselines.of([mask_of(pixels)] * 3).compare(mask_of(pixels))
    assert found["the mean box"].iou == found["the mean mask"].iou == 1
    assert found["the whole image"].iou == 0.25


def test_overlays_are_bright_where_maps_are_and_masks_are_pink_with_a_green_border() -> None:
    black = Image.new("RGB", (60, 40))
    maps = np.array([[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.01], [0.0, 0.01, 0.0]]])
    together = combine(maps)
    assert together[0, 2] == pytest.approx(0.75) and together.sum() == pytest.approx(1)
    drawn = np.asarray(heat(black, together)).astype(int).sum(-1)
    assert drawn[10, 55] > 2 * drawn[30, 5]
    found, expected = np.zeros((2, 40, 60), dtype=bool)
    found[:20], expected[20:] = True, True
    shown = np.asarray(masked(black, found, expected))
    assert tuple(shown[5, 5]) == (114, 15, 76) and tuple(shown[20, 30]) == (20, 150, 70)
    assert not shown[30, 30].any()


def test_bad_masks_are_found_before_training(data, tiny_checkpoint, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = [json.loads(line) for line in (data / "scenes_heldout.jsonl").read_text().splitlines()]
    rows[0]["masks"][1]["segmentation"]["size"] = [5, 5]
    rows[1]["masks"][0]["phrase"] = "a zebra"
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--annotation_path", str(tmp_path / "bad.jsonl"), "--data_path", str(data), "--output", str(tmp_path)]
    flags += ["--task", "grounding", "--workers", "1"]
    assert check_image([*flags, "--model_name_or_path", str(tiny_checkpoint("qwen3_vl"))]) == 1
    found = [json.loads(line) for line in (tmp_path / "bad_problems.jsonl").read_text().splitlines()]
    assert [(one["line"], one["category"]) for one in found] == [(1, "bad_mask"), (2, "bad_mask")]
    assert "mask 1 of 'masks'" in found[0]["reason"] and "'a zebra'" in found[1]["reason"]
    assert check_image(flags) == 2
    assert "--task grounding needs --model_name_or_path" in capsys.readouterr().err


def test_a_folder_that_learned_masks_answers_as_before(trained, tmp_path) -> None:
    output = tmp_path / "answers.jsonl"
    assert predict([*trained, "--dataset_use", "heldout", "--max_new_tokens", "2", "--output", str(output)]) == 0
    assert len(output.read_text().splitlines()) == 3
    assert "open_grounder" in (Path(trained[1]) / "README.md").read_text()
