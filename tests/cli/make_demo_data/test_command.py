"""The demo's data: files that can be read, a clean split, and the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.cli.make_demo_data.command import MANIFEST, make_demo_data
from qwenvl.cli.make_demo_data.drawing import COLOURS
from qwenvl.data.media.video.decode import PyAvBackend

LIMIT = 12
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y downwards
TASKS = ("digits", "comparisons", "grounding", "motion")


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the first samples of every task."""
    folder = tmp_path_factory.mktemp("demo")
    assert make_demo_data(folder, limit=LIMIT)
    return folder


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of an annotation file."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def media(record: dict[str, Any]) -> list[str]:
    """Return the media paths of a record."""
    value = record.get("image", record.get("video"))
    return [value] if isinstance(value, str) else value


def answer(record: dict[str, Any]) -> str:
    """Return the answer of a record."""
    return record["conversations"][1]["value"]


@pytest.mark.parametrize("task", TASKS)
def test_every_tag_has_a_file_and_ids_are_unique(demo_data: Path, task: str) -> None:
    records = read(demo_data, f"{task}_train") + read(demo_data, f"{task}_heldout")
    assert len(records) == 2 * LIMIT
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        question = record["conversations"][0]["value"]
        assert question.count("<image>") + question.count("<video>") == len(media(record))
        assert all((demo_data / path).is_file() for path in media(record))


def test_no_media_file_is_both_trained_and_held_out(demo_data: Path) -> None:
    paths = {
        split: {path for task in TASKS for record in read(demo_data, f"{task}_{split}") for path in media(record)}
        for split in ("train", "heldout")
    }
    assert paths["train"] and paths["heldout"] and not paths["train"] & paths["heldout"]


def test_comparisons_name_the_larger_digit(demo_data: Path) -> None:
    digits = {media(record)[0]: int(answer(record)) for record in read(demo_data, "digits_train")}
    for record in read(demo_data, "comparisons_train"):
        first, second = (digits[path] for path in media(record))
        assert first != second
        assert answer(record) == ("first" if first > second else "second")


def test_boxes_are_relative_and_hold_exactly_the_named_shape(demo_data: Path) -> None:
    for record in read(demo_data, "grounding_train"):
        box = json.loads(answer(record))
        colour = COLOURS[box["label"].split()[0]]
        with Image.open(demo_data / media(record)[0]) as picture:
            pixels, size = np.asarray(picture), picture.width
        rows, columns = np.nonzero((pixels == colour).all(axis=-1))
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert all(0 <= edge <= 1000 for edge in box["bbox_2d"])
        assert np.allclose(np.array(box["bbox_2d"]) * size / 1000, drawn, atol=1)


def test_clips_move_the_way_the_answer_says(demo_data: Path) -> None:
    for record in read(demo_data, "motion_train"):
        video, path = PyAvBackend(), str(demo_data / media(record)[0])
        header = video.header(path)
        frames = video.frames(path, np.arange(header.num_frames)).permute(0, 2, 3, 1).numpy().astype(int)
        assert header.num_frames == 8 and header.fps == pytest.approx(4.0)
        away_from_paper = np.abs(frames - 245).max(axis=-1) > 60
        centres = [np.argwhere(mask).mean(axis=0) for mask in (away_from_paper[0], away_from_paper[-1])]
        moved = np.sign(np.round((centres[1] - centres[0]) / 10))
        assert tuple(moved[::-1]) == STEPS[answer(record)]


def test_same_seed_same_bytes_and_another_seed_others(demo_data: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "again", limit=LIMIT)
    make_demo_data(tmp_path / "other", limit=LIMIT, seed=1)

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(demo_data) == files(tmp_path / "again")
    assert files(demo_data).keys() == files(tmp_path / "other").keys()
    assert files(demo_data)["grounding_train.jsonl"] != files(tmp_path / "other")["grounding_train.jsonl"]
    assert files(demo_data)["digits_heldout.jsonl"] == files(tmp_path / "other")["digits_heldout.jsonl"]


def test_a_complete_folder_is_left_alone_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    assert make_demo_data(tmp_path, limit=2)
    assert not make_demo_data(tmp_path, limit=2)
    victim = next(tmp_path.glob("media/digits_train/*.png"))
    victim.unlink()
    assert make_demo_data(tmp_path, limit=2) and victim.is_file()
    (tmp_path / MANIFEST).unlink()
    assert make_demo_data(tmp_path, limit=2)
    assert make_demo_data(tmp_path, limit=3)
