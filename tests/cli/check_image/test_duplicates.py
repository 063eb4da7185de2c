"""``--duplicates``: near duplicates and leaks are problems of the training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.cli.check_image.command import main
from tests.cli.checking import problems, read_lines, write_lines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(tmp_path / f"{name}.png")
    Image.open(tmp_path / "a.png").resize((200, 150)).save(tmp_path / "a_smaller.jpg", quality=60)
    Image.open(tmp_path / "b.png").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b_turned.png")
    monkeypatch.setenv("QWENVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(identifier: str, image: str, question: str = "What do you see in it?") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": "Coloured noise."}]
    return {"id": identifier, "image": image, "conversations": turns}


def run(folder: Path, *flags: str, **datasets: list[dict[str, Any]]) -> int:
    registry = {}
    for name, records in datasets.items():
        write_lines(folder / f"{name}.jsonl", records)
        registry[name] = {"annotation_path": str(folder / f"{name}.jsonl"), "data_path": str(folder)}
    (folder / "registry.py").write_text(f"data_dict = {json.dumps(registry)}")
    return main(["--dataset_registry", str(folder / "registry.py"), "--output", str(folder / "out"), *flags])


TRAIN = [record("a", "a.png"), record("again", "a.png"), record("smaller", "a_smaller.jpg"), record("c", "c.png")]


def test_problems_within_and_across_datasets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dataset_use", "train,more", "--duplicates", "--write_clean")
    assert run(folder, *flags, train=TRAIN, more=[record("copy", "c.png"), record("b", "b.png")]) == 1
    assert problems(folder, "train") == {"again": ["duplicate"], "smaller": ["near_duplicate"]}
    assert problems(folder, "more") == {"copy": ["near_duplicate"]}
    (line,) = read_lines(folder / "out" / "more_problems.jsonl")
    where = f"dataset 'train', {folder / 'train.jsonl'}:4 (id 'c')"
    assert line["reason"] == f"it has the same media and 100% of its text in common with {where}. Remove one of them."
    assert [one["id"] for one in read_lines(folder / "out" / "train_valid.jsonl")] == ["a", "c"]
    assert "near_duplicate" in capsys.readouterr().out


def test_leaks(folder: Path) -> None:
    held_out = [record("held", "b_turned.png", "Name it.")]
    train = [*TRAIN, record("b", "b.png"), record("other", "b.png", "How bright is it?")]
    flags = ("--dataset_use", "train", "--eval_dataset_use", "held_out", "--duplicates")
    assert run(folder, *flags, train=train, held_out=held_out) == 1
    found = problems(folder, "train")
    assert found == {"again": ["duplicate"], "smaller": ["near_duplicate"], "b": ["leak"], "other": ["leak"]}
    reason = next(one["reason"] for one in read_lines(folder / "out" / "train_problems.jsonl") if one["id"] == "b")
    assert reason.startswith(
        "its image or clip (turned by 270 degrees) is in the evaluation data too: dataset 'held_out'"
    )


def test_evaluation_data_without_the_comparison_are_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(folder, "--dataset_use", "train", "--eval_dataset_use", "train", train=TRAIN) == 2
    assert "--eval_dataset_use is compared with the training data: add --duplicates True." in caplog.text
