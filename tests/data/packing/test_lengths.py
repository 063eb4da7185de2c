"""Lengths without decoding are those that samples really get, and packs hold every usable row once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl.cli.data_args import ToolArguments, open_encoder
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.packing.lengths import measure_lengths
from qwenvl.data.packing.plan import make_plan
from qwenvl.data.sample_stats import MEASURES
from qwenvl.data.types import Sample
from qwenvl.families import FAMILIES
from qwenvl.utils.errors import Origin, SampleError, UserError
from tests.data.counting import counted_when_decoded, encoder_of, left_out_when_decoded, table_of, talk, write_media

CHECKPOINTS = [(family, None) for family in sorted(FAMILIES)] + [("qwen3_vl", "thinking")]
IMAGES = ["turned.jpg", "plain.jpg", "small.png", "narrow.webp", {"image": "plain.jpg", "max_pixels": 64 * 64}]
VIDEOS = [
    "slow.mp4",
    "fast.mp4",
    {"video": "fast.mp4", "fps": 5, "video_end": 2.5},
    {"frames": ["small.png"] * 3, "fps": 2},
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "left"}}}

words = st.text("ab e\n.,é語\u0301", max_size=12) | st.sampled_from(
    ["assistant", "<|im_end|>\n", "<think>\nHm.\n</think>\n\nYes", "\n\nSo", "<image>", "1234567", "</tool_response>"]
)
texts = st.lists(words, min_size=1, max_size=4).map("".join).filter(bool)
pieces = st.sampled_from(["<image>", "<image>\n", "<video>", "What?", " and "]) | words
questions = st.lists(pieces, min_size=1, max_size=4).map("".join).filter(bool)


@st.composite
def samples(draw: st.DrawFn) -> dict[str, Any]:
    """A sample of any kind, most of them usable."""
    record: dict[str, Any] = {"id": str(draw(st.integers(0, 99))), "image": [], "video": [], "conversations": []}
    if draw(st.booleans()):
        record["system"] = draw(texts)
    if draw(st.integers(0, 3)) == 0:
        record["tools"] = [TOOL]
    for _ in range(draw(st.integers(1, 3))):
        question = draw(questions)
        answer = {"from": "gpt", "value": draw(texts)}
        record["image"] += [draw(st.sampled_from(IMAGES)) for _ in range(question.count("<image>"))]
        record["video"] += [draw(st.sampled_from(VIDEOS)) for _ in range(question.count("<video>"))]
        if "tools" in record and draw(st.booleans()):
            called = [{"from": "gpt", "value": "", "tool_calls": [CALL]}, {"from": "tool", "value": draw(texts)}]
            answer_turns = [*called, answer]
        else:
            answer_turns = [answer]
        if draw(st.integers(0, 3)) == 0:
            answer["reasoning_content"] = draw(texts)
        record["conversations"] += [{"from": "human", "value": question}, *answer_turns]
    if record["image"] and draw(st.integers(0, 5)) == 0:
        record["image"][0] = "missing.jpg"
    return record


rows = st.lists(samples() | st.lists(samples(), min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=str)
def make_encoder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Callable[..., SampleEncoder]:
    return cache(lambda *limit, **flags: encoder_of(tiny_checkpoint(*request.param), *limit, **flags))


@given(rows, st.sampled_from([60, 150, 400, 4000]), st.sampled_from(["drop", "truncate_turns"]))
@settings(max_examples=25)
def test_lengths_are_those_of_training(
    make_encoder: Callable[..., SampleEncoder], media: Path, records: list[Any], limit: int, overlength: str
) -> None:
    """Text, pictures, videos, tools, thinking, many turns, packed rows: to the token, with the same left out."""
    encoder = make_encoder(limit, overlength=overlength)
    dataset = ConversationDataset([table_of(records, media)], encoder, skip_bad_samples=True)
    measured = measure_lengths(dataset, workers=0)
    thoughts = measured.measures["thoughts"].copy()
    assert (thoughts <= measured.measures["answers"]).all()
    measured.measures["thoughts"] = 0
    assert measured.measures.tolist() == [counted_when_decoded(dataset[index]) for index in range(len(dataset))]
    assert [event.message for event in measured.events] == left_out_when_decoded(dataset)


@pytest.mark.parametrize("model", ["qwen3vl", "qwen2.5vl"])
@pytest.mark.parametrize(("folder", "limits"), [("default", {}), ("sft_sh", {"min_pixels": 784, "max_pixels": 50176})])
def test_lengths_are_those_of_the_official_recipe(
    model: str, folder: str, limits: dict[str, int], shared_folder: Path
) -> None:
    golden = shared_folder / "golden"
    processor = shared_folder / "processors" / model.replace("2.5", "2_5")
    encoder, _ = open_encoder(ToolArguments(model_name_or_path=str(processor), **limits), 1 << 20)
    records = {record["id"]: record for record in json.loads((golden / "samples.json").read_text())}
    for name in json.loads((golden / f"{model}-{folder}" / "expected.json").read_text()):
        arrays = np.load(golden / f"{model}-{folder}" / f"{name}.npz")
        counted = encoder.measure(Sample(Origin("golden", "samples.json", 1), records[name], str(golden / "media")))
        grids = [grid for kind in ("image", "video") for grid in np.atleast_2d(arrays.get(f"{kind}_grid_thw", []))]
        assert (counted.tokens, counted.trained_tokens, counted.patches) == (
            arrays["input_ids"].size,
            (arrays["labels"] != -100).sum(),
            sum(int(np.prod(grid)) for grid in grids if len(grid)),
        )


MANY = [
    talk("Q" + "<image>?" * (number % 3), "It." * number, image=["small.png"] * (number % 3))
    for number in range(1, 301)
]


@pytest.fixture
def encoder(tiny_checkpoint: Callable[..., Path]) -> SampleEncoder:
    return encoder_of(tiny_checkpoint("qwen3_vl"), 700)


def test_any_number_of_processes_counts_the_same(encoder: SampleEncoder, media: Path) -> None:
    tables = [table_of(MANY, media, rows=[*range(50, 250), 7, 60, 60]), table_of(MANY[:100], media, name="other")]
    dataset = ConversationDataset(tables, encoder)
    alone, several = measure_lengths(dataset, workers=0), measure_lengths(dataset, workers=2)
    assert alone.measures.tolist() == several.measures.tolist()
    assert alone.measures.dtype == MEASURES
    assert len(alone.measures) == len(dataset) == 303
    assert alone.measures[[201, 202]].tolist() == alone.measures[[10, 10]].tolist()


def test_each_dataset_has_counts_of_its_own(encoder: SampleEncoder, media: Path, tmp_path: Path) -> None:
    """Of two, one is known from an earlier run."""
    known, new = table_of(MANY[:3], media, name="known"), table_of(MANY[50:58], media, name="new")
    measure_lengths(ConversationDataset([known], encoder), tmp_path, workers=0)
    for tables in ([known, new], [new, known]):
        dataset = ConversationDataset(tables, encoder)
        expected = measure_lengths(dataset, workers=0).measures.tolist()
        assert measure_lengths(dataset, tmp_path, workers=0).measures.tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_bad_row_stops_the_run(encoder: SampleEncoder, media: Path, workers: int) -> None:
    bad = talk("<image>?", "A", image="missing.png")
    records = [*MANY[:100], bad, *MANY[:100], bad, "no record"]
    dataset = ConversationDataset([table_of(records, media)], encoder)
    with pytest.raises(SampleError, match=r"rows\.jsonl:101: .*missing\.png does not exist.*--on_bad_sample skip"):
        measure_lengths(dataset, workers=workers)


def test_a_row_is_looked_at_and_reported_once(encoder: SampleEncoder, media: Path) -> None:
    """Whatever is done together; reports can be written as JSON. By default all cores count."""
    bad = talk("<image>?", "A", image="missing.png")
    dataset = ConversationDataset([table_of([*MANY[:150], bad, *MANY[:9]], media)], encoder, skip_bad_samples=True)
    measured = measure_lengths(dataset, workers=0)
    assert [json.loads(json.dumps(event.record))["line"] for event in measured.events] == [151]
    assert np.flatnonzero(measured.measures["samples"] == 0).tolist() == [150]
    everywhere = measure_lengths(dataset)
    assert everywhere.measures.tolist() == measured.measures.tolist()
    assert everywhere.events == measured.events


def test_a_mistake_of_the_run_stops_it(encoder: SampleEncoder, media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_backend(*_: Any) -> None:
        raise UserError("No video backend works")

    monkeypatch.setattr("qwenvl.data.media.reader.choose_backend", no_backend)
    dataset = ConversationDataset([table_of([talk("<video>?", "A", video="slow.mp4")], media)], encoder, True)
    with pytest.raises(UserError, match="No video backend"):
        measure_lengths(dataset, workers=0)


def test_what_a_call_through_transformers_leaves_behind_does_not_matter(encoder: SampleEncoder, media: Path) -> None:
    dataset = ConversationDataset([table_of(MANY[20:22], media)], encoder)
    before = measure_lengths(dataset, workers=0).measures.tolist()
    tokenizer = encoder.template._processor.tokenizer  # type: ignore[attr-defined]
    tokenizer(["a", "b " * 50], padding=True, truncation=True, max_length=20)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert measure_lengths(dataset, workers=0).measures.tolist() == before


def test_packs_hold_every_usable_row_once(encoder: SampleEncoder, media: Path) -> None:
    records = [[MANY[n], MANY[n + 1], MANY[3 * n]] if n % 4 == 3 else MANY[n] for n in range(90)]
    records.insert(5, talk("<image>?", "A", image="missing.png"))
    dataset = ConversationDataset([table_of(records, media)], encoder, skip_bad_samples=True)
    measured = measure_lengths(dataset, workers=0)
    lengths = measured.measures["tokens"]
    packs = dataset.packed(make_plan(dataset, measured, seed=0).packs)
    assert len(packs) < np.count_nonzero(lengths)
    held = [sample.origin for index in range(len(packs)) for sample in packs.samples(index)]
    usable = [sample.origin for index in np.flatnonzero(lengths) for sample in dataset.samples(int(index))]
    assert sorted(map(str, held)) == sorted(map(str, usable))
    assert 5 not in np.flatnonzero(lengths)
    for index in range(len(packs)):
        item = packs[index]
        assert item.error is None
        left_out = [event.record["line"] for event in item.events]  # members that their own packed row has no room for
        assert len(item.samples) == len(packs.samples(index)) - len(left_out)
        assert all(len(dataset.samples(line - 1)) > 1 for line in left_out)
        assert sum(len(sample.tokens) for sample in item.samples) <= 700
