"""Near duplicates and leaks are found in real images, and different ones are not."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from qwenvl.data.dataset import SampledTable
from qwenvl.data.duplicates.contents import Contents, read_contents
from qwenvl.data.duplicates.find import Match, find_matches
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec

TURN = Image.Transpose
QUESTION = "Which digit do you see?"
LONG = "the quick brown fox jumps over the lazy dog and then runs back to the river where the other foxes wait for it"


@functools.cache
def digits() -> np.ndarray:
    return np.asarray(load_digits().images)


def digit(index: int) -> Image.Image:
    pixels = (255 - digits()[index] * (255 / 16)).astype(np.uint8)
    return Image.fromarray(pixels).resize((112, 112), Image.Resampling.BICUBIC)


def record(media: str | Sequence[str] | None, text: str = "Five.", question: str = QUESTION) -> dict[str, Any]:
    names = [media] if isinstance(media, str) else list(media or ())
    turns = [{"from": "human", "value": "<image>" * len(names) + question}, {"from": "gpt", "value": text}]
    return {"conversations": turns, **({"image": names} if names else {})}


class Maker:
    """Writes images and datasets into a folder, and compares the datasets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, name: str, image: Image.Image, **options: Any) -> str:
        image.save(self.folder / name, **options)
        return name

    def read(self, name: str, records: Sequence[dict[str, Any]], workers: int = 0) -> Contents:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        table = open_annotations(DatasetSpec(name, (str(path),), str(self.folder)), str(self.folder / "index"))
        rows = SampledTable(table, np.arange(len(table)))
        return read_contents(rows, (), False, self.folder / "cache", workers)

    def matches(self, train: Sequence[dict[str, Any]], evaluation: Sequence[dict[str, Any]] = ()) -> list[Match]:
        contents = [self.read("train", train)]
        return find_matches(contents, [self.read("held_out", evaluation)] if evaluation else [])


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def places(matches: Sequence[Match]) -> list[tuple[int, tuple[int, int], str, bool]]:
    """Rows of the training samples, (table, row) of what they repeat, views and leaks."""
    return [(one.sample.row, (one.other.table, one.other.row), one.view, one.leak) for one in matches]


def test_copies_among_a_thousand_digits(maker: Maker) -> None:
    train = [record(maker.save(f"{index}.png", digit(index))) for index in range(1000)]
    held_out = [record(maker.save(f"e{index}.png", digit(index)), "?") for index in range(1000, 1100)]
    innocent = len(train)
    train += [
        record(maker.save("smaller.jpg", digit(3).resize((80, 80)), quality=50)),
        record(maker.save("mirrored.jpg", digit(4).transpose(TURN.FLIP_LEFT_RIGHT))),
        record(maker.save("turned.png", digit(5).rotate(90))),
        record(maker.save("both.png", digit(6).transpose(TURN.TRANSVERSE))),
        record(maker.save("leaked.jpg", digit(1050).rotate(180), quality=70), "One.", "Read it."),
    ]
    assert places(maker.matches(train, held_out)) == [
        (innocent, (0, 3), "", False),
        (innocent + 1, (0, 4), "mirrored", False),
        (innocent + 2, (0, 5), "turned by 90 degrees", False),
        (innocent + 3, (0, 6), "mirrored and turned by 270 degrees", False),
        (innocent + 4, (1, 50), "turned by 180 degrees", True),
    ]


def test_questions_about_one_image_are_no_duplicates(maker: Maker) -> None:
    image = maker.save("a.png", digit(0))
    train = [record(image, "Zero.", question) for question in (QUESTION, LONG, "Is it even? Say yes or no, please.")]
    assert maker.matches(train) == []
    assert [match.sample.row for match in maker.matches(train, [record(image, "0", "Read.")])] == [0, 1, 2]


def test_texts(maker: Maker) -> None:
    changed = LONG.replace("brown", "RED,")
    train = [
        record(None, LONG + LONG),
        record(None, LONG + changed),
        record(None, changed[::-1]),
        record(None, "Yes.", "Sure?"),
    ]
    found = maker.matches(train, [record(None, "yes", "SURE")])
    assert places(found) == [(1, (0, 0), "", False), (3, (1, 0), "", True)]
    assert found[0].in_common == pytest.approx(0.88, abs=0.08)
    assert found[1].in_common == 1


def test_texts_without_spaces(maker: Maker) -> None:
    train = [
        record(None, "这是一张很大的图片里面有三只猫和两只狗在草地上玩耍看起来很开心" * 2 + end)
        for end in ("。", "啊。")
    ]
    assert places(maker.matches(train)) == [(1, (0, 0), "", False)]


def test_several_images_have_to_be_the_same_in_order(maker: Maker) -> None:
    a, b = (maker.save(f"{name}.png", digit(index)) for name, index in (("a", 0), ("b", 1)))
    again = maker.save("c.jpg", digit(0))
    train = [record([a, b]), record([b, a]), record([again, b]), record([a]), record([a, a])]
    assert places(maker.matches(train)) == [(2, (0, 0), "", False)]


def test_blank_images_leak_nothing(maker: Maker) -> None:
    white, other = (
        maker.save(name, Image.new("RGB", (size, size), "white")) for name, size in (("w.png", 56), ("v.png", 99))
    )
    assert maker.matches([record(white, LONG)], [record(other, "Else.")]) == []
    assert places(maker.matches([record(white, LONG), record(other, LONG)])) == [(1, (0, 0), "", False)]


def test_orientation_in_exif_counts(maker: Maker) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    train = [record(maker.save("a.jpg", digit(7))), record(maker.save("b.jpg", digit(7).rotate(90), exif=exif))]
    assert places(maker.matches(train)) == [(1, (0, 0), "", False)]


def test_bad_samples_and_files_are_left_to_the_check(maker: Maker) -> None:
    (maker.folder / "page.jpg").write_text("<html>")
    train = [record("none.jpg"), record("page.jpg"), {"text": "?"}, record("none.jpg", LONG), record("page.jpg", LONG)]
    assert maker.matches(train) == []


def test_hashes_are_kept_until_a_file_changes(maker: Maker) -> None:
    names = [maker.save(f"{index}.png", digit(index)) for index in range(3)]
    train = [record(name) for name in names]
    first = maker.read("train", train)
    (cache,) = (maker.folder / "cache" / "image_hashes").iterdir()
    state = cache.stat().st_mtime_ns
    again = maker.read("train", train)
    assert cache.stat().st_mtime_ns == state
    assert np.array_equal(again.features, first.features)
    maker.save("0.png", digit(9).resize((60, 60)))
    assert (maker.read("train", train).features["key"] != first.features["key"]).any()
    assert maker.matches([*train, record(maker.save("n.png", digit(9)))])[0].other.row == 0


def test_processes_read_what_one_reads(maker: Maker) -> None:
    names = [maker.save(f"{index}.png", digit(index)) for index in range(5)]
    train = [record(names[index % 5], str(index)) for index in range(300)]
    one, two = maker.read("train", train), Maker(maker.folder).read("train", train, workers=2)
    for name in Contents.__slots__:
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
