"""Lengths without decoding are those that samples really get, and packs hold every usable row once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from qwenvl.arguments import DataArguments
from qwenvl.data.collation import Item
from qwenvl.data.dataset import ConversationDataset, open_tables
from qwenvl.data.lengths import measure_lengths
from qwenvl.data.plans import make_plan
from qwenvl.data.processor import build_encoder
from qwenvl.data.types import DatasetSpec
from qwenvl.utilities.errors import SampleError
from qwenvl.utilities.families import get_family

LIMIT = 120


def row(number: int, folder: Path) -> object:
    """Text, one picture, two pictures, a packed row, in turn; of different lengths."""
    words = " word" * (number % 7)
    if number % 4 == 3:
        return [row(4 * number, folder), row(4 * number + 1, folder)]
    images = [f"{number}-{k}.png" for k in range(number % 4)]
    for k, name in enumerate(images):
        Image.new("RGB", (40 + 13 * (number % 5), 50 + 30 * k)).save(folder / name)
    turns = [
        {"from": "human", "value": "<image>" * len(images) + "What?" + words},
        {"from": "gpt", "value": "It." + words},
    ]
    return {"id": str(number), "image": images, "conversations": turns}


@pytest.fixture
def dataset(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> ConversationDataset:
    rows = [row(number, tmp_path) for number in range(30)]
    rows.insert(
        5,
        {
            "image": "missing.png",
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A"}],
        },
    )
    rows.insert(9, {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "long " * 500}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    return open_dataset(tmp_path, tiny_checkpoint("qwen3_vl"), skip=True)


def open_dataset(folder: Path, checkpoint: Path, skip: bool) -> ConversationDataset:
    arguments = DataArguments(dataset_use="d", min_pixels=32 * 32, max_pixels=128 * 128)
    config = AutoConfig.from_pretrained(checkpoint)
    encoder = build_encoder(AutoProcessor.from_pretrained(checkpoint), config, get_family("qwen3_vl"), arguments, LIMIT)
    spec = DatasetSpec("d", (str(folder / "rows.jsonl"),), str(folder))
    return ConversationDataset(open_tables([spec], seed=0), encoder, skip)


def measured_when_decoded(item: Item) -> tuple[int, ...]:
    """Count what training gets, in the order of MEASURES."""
    lengths = [len(sample.tokens) for sample in item.samples]
    trained = [int((sample.tokens.labels != -100).sum()) for sample in item.samples]
    grids = [medium.grid for sample in item.samples for medium in sample.media]
    patches = sum(t * h * w for t, h, w in grids)
    squares = sum(length * length for length in lengths), sum(t * (h * w) ** 2 for t, h, w in grids)
    return len(lengths), sum(lengths), sum(trained), patches, *squares


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_are_those_of_training(dataset: ConversationDataset, workers: int) -> None:
    measured = measure_lengths(dataset, workers=workers)
    assert measured.measures.tolist() == [measured_when_decoded(dataset[index]) for index in range(len(dataset))]
    assert {event.kind for event in measured.events} == {"bad", "overlength"}
    assert sorted(event.message for event in measured.events) == sorted(
        event.message for index in range(len(dataset)) for event in dataset[index].events
    )
    assert measured.measures["tokens"][[5, 9]].tolist() == [0, 0]


def test_packs_hold_every_usable_row_once(dataset: ConversationDataset) -> None:
    measured = measure_lengths(dataset, workers=0)
    lengths = measured.measures["tokens"]
    packs = dataset.packed(make_plan(dataset, measured, seed=0).packs)
    assert len(packs) < np.count_nonzero(lengths)
    held = [sample.origin for index in range(len(packs)) for sample in packs.samples(index)]
    usable = [sample.origin for index in np.flatnonzero(lengths) for sample in dataset.samples(int(index))]
    assert sorted(map(str, held)) == sorted(map(str, usable))
    for index in range(len(packs)):
        item = packs[index]
        assert item.error is None
        left_out = [event.record["line"] for event in item.events]  # members that their own packed row has no room for
        assert len(item.samples) == len(packs.samples(index)) - len(left_out)
        assert all(len(dataset.samples(line - 1)) > 1 for line in left_out)
        assert sum(len(sample.tokens) for sample in item.samples) <= LIMIT


def test_a_bad_row_stops_the_run_unless_it_is_to_be_skipped(
    dataset: ConversationDataset, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    del dataset  # has written the files
    with pytest.raises(SampleError, match=r"rows\.jsonl:6"):
        measure_lengths(open_dataset(tmp_path, tiny_checkpoint("qwen3_vl"), skip=False), workers=0)
