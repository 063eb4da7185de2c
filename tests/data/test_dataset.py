"""Rows to encoded samples: order, packed rows, errors with their place, lengths, and the way to other processes."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from qwenvl.config import DataArguments
from qwenvl.data.dataset import ConversationDataset, SampledTable, open_tables, split_tables
from qwenvl.data.encoding.encoded import Item
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder, open_processor
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.sampler import FILLER
from qwenvl.data.types import DatasetSpec
from qwenvl.families import get_family
from qwenvl.utils.errors import SampleError, UserError

MakeEncoder = Callable[..., SampleEncoder]
Tables = Callable[..., list[SampledTable]]


@pytest.fixture(scope="module")
def make_encoder(tiny_checkpoint: Callable[..., Path]) -> MakeEncoder:
    folder = tiny_checkpoint("qwen3_vl")
    processor, config = open_processor(str(folder)), AutoConfig.from_pretrained(folder)

    def make(max_length: int = 10_000, **changes: Any) -> SampleEncoder:
        arguments = DataArguments(min_pixels=32 * 32, max_pixels=64 * 64, **changes)
        return build_encoder(processor, config, get_family("qwen3_vl"), arguments, max_length)

    return make


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """Function of rows by dataset name that writes and opens them."""
    Image.new("RGB", (64, 96)).save(tmp_path / "a.png")

    def write(**rows: list[Any]) -> list[SampledTable]:
        specs = []
        for name, records in rows.items():
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
            specs.append(DatasetSpec(name, (str(file),), str(tmp_path)))
        return open_tables(specs, seed=0)

    return write


def talk(name: str, *turns: str, **fields: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    written = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(turns or ("Hi", name))]
    return {"id": name, "conversations": written, **fields}


BAD = {"id": "bad", "conversations": [{"from": "human", "value": "Hi"}]}


def answers(item: Item, encoder: SampleEncoder) -> list[str]:
    tokenizer = encoder.template._processor.tokenizer  # type: ignore[attr-defined]
    return [tokenizer.decode(s.tokens.labels[s.tokens.labels >= 0]).split("<")[0] for s in item.samples]


def test_indices_run_over_the_datasets_in_order(make_encoder: MakeEncoder, tables: Tables) -> None:
    opened = tables(a=[talk("a1"), talk("a2")], b=[talk("b1")], c=[talk("c1"), talk("c2"), talk("c3")])
    opened[2] = SampledTable(opened[2].table, np.array([2, 0, 2]))
    encoder = make_encoder()
    dataset = ConversationDataset(opened, encoder)
    assert len(dataset) == 6
    found = [answers(dataset[index], encoder) for index in range(6)]
    assert found == [["a1"], ["a2"], ["b1"], ["c3"], ["c1"], ["c3"]]


def test_a_filler_is_nothing(make_encoder: MakeEncoder, tables: Tables) -> None:
    assert ConversationDataset(tables(a=[talk("a1")]), make_encoder())[FILLER] == Item()


def test_a_packed_row_loses_its_bad_member_alone(make_encoder: MakeEncoder, tables: Tables) -> None:
    opened = tables(a=[[talk("one"), BAD, talk("two")]])
    encoder = make_encoder()
    item = ConversationDataset(opened, encoder, skip_bad_samples=True)[0]
    assert answers(item, encoder) == ["one", "two"]
    assert [(event.kind, event.record["member"], event.record["category"]) for event in item.events] == [
        ("bad", 2, "no_answer")
    ]
    stopped = ConversationDataset(opened, encoder)[0]
    assert isinstance(stopped.error, SampleError)
    assert "a.jsonl:1, member 2 (id 'bad')" in str(stopped.error)


def test_a_packed_row_holds_what_fits(make_encoder: MakeEncoder, tables: Tables) -> None:
    opened = tables(a=[[talk("one"), talk("two"), talk("six", "word " * 30, "six"), talk("ten")]])
    one = len(make_encoder().plans(opened[0].table[0][0])[0].tokens)
    encoder = make_encoder(3 * one)
    item = ConversationDataset(opened, encoder)[0]
    assert answers(item, encoder) == ["one", "two", "ten"]
    assert [(event.kind, event.record["member"]) for event in item.events] == [("overlength", 3)]
    assert sum(len(sample.tokens) for sample in item.samples) <= 3 * one


@pytest.mark.parametrize("row", ['{"id": 1, ', "3", BAD, talk("x", "<image>", "?", image="none.png")])
def test_errors_carry_their_place_and_survive_the_way_from_a_worker(
    make_encoder: MakeEncoder, tables: Tables, row: Any
) -> None:
    opened = tables(a=[talk("a1"), row, talk("a3")])
    error = pickle.loads(pickle.dumps(ConversationDataset(opened, make_encoder())[1])).error
    assert isinstance(error, SampleError)
    assert error.origin is not None
    assert (error.origin.dataset, error.origin.line) == ("a", 2)
    assert str(error).startswith("dataset 'a', ")
    assert "--on_bad_sample skip" in str(error)


def test_a_mistake_of_the_run_is_handed_over_too(make_encoder: MakeEncoder, tables: Tables) -> None:
    """What a worker raises would arrive as a text with its traceback. Skipping does not pass over it."""
    opened = tables(a=[talk("a1"), talk("a2")])
    sent = pickle.dumps(ConversationDataset(opened, make_encoder(), skip_bad_samples=True))
    file = Path(opened[0].table.spec.annotation_paths[0])
    file.write_text(file.read_text() + "\n")
    os.utime(file, (0, 0))
    error = pickle.loads(sent)[0].error
    assert isinstance(error, UserError)
    assert not isinstance(error, SampleError)
    assert "changed while it was in use" in str(error)


def test_another_process_encodes_the_same(make_encoder: MakeEncoder, tables: Tables) -> None:
    dataset = ConversationDataset(tables(a=[talk("x", "<image>What?", "It.", image="a.png")]), make_encoder())
    here, there = dataset[0].samples[0], pickle.loads(pickle.dumps(dataset))[0].samples[0]
    assert torch.equal(here.tokens.input_ids, there.tokens.input_ids)
    assert torch.equal(here.tokens.labels, there.tokens.labels)
    assert torch.equal(here.media[0].frames, there.media[0].frames)


def test_a_usable_sample_is_looked_for(make_encoder: MakeEncoder, tables: Tables) -> None:
    long = talk("long", "word " * 100, "x")
    fine = make_encoder(60)
    ConversationDataset(
        tables(a=[long, BAD, [long, talk("fits")]]), fine, skip_bad_samples=True
    ).require_usable_sample()
    with pytest.raises(UserError, match=r"None of the 2 training rows.* The first one: .*a\.jsonl:1 \(id 'long'\)"):
        ConversationDataset(tables(a=[long, BAD]), fine, skip_bad_samples=True).require_usable_sample()
    with pytest.raises(SampleError, match=r"a\.jsonl:2 \(id 'bad'\).*--on_bad_sample skip"):
        ConversationDataset(tables(a=[long, BAD, talk("fits")]), fine).require_usable_sample()
    strict = make_encoder(60, overlength="error")
    with pytest.raises(SampleError, match=r"a\.jsonl:1.*--overlength drop"):
        ConversationDataset(tables(a=[long, talk("fits")]), strict, skip_bad_samples=True).require_usable_sample()


def test_truncation_keeps_whole_turns_and_their_media(make_encoder: MakeEncoder, tables: Tables) -> None:
    """For every limit: exactly the sample that was written with fewer turns, or none where not even one answer fits."""
    turns = ["<image>\nOne?", "1.", "<image>\nTwo? " + "word " * 9, "Two.", "Three?", "3.", "<image>\nFour?", "4."]
    images = ["a.png"] * 3
    shorter = [
        talk("x", *turns[:stop], image=images[: " ".join(turns[:stop]).count("<image>")]) for stop in (2, 4, 6, 8)
    ]
    opened = tables(full=[talk("x", *turns, image=images)], shorter=shorter)
    plans = [make_encoder().plans(sample)[0] for (sample,) in opened[1].table]
    lengths = [len(plan.tokens) for plan in plans]
    for limit in range(lengths[0] - 3, lengths[-1] + 3):
        item = ConversationDataset(opened[:1], make_encoder(limit, overlength="truncate_turns"))[0]
        fitting = [plan for plan, length in zip(plans, lengths, strict=True) if length <= limit]
        if not fitting:
            assert (item.samples, [event.kind for event in item.events]) == ((), ["overlength"])
            continue
        (sample,) = item.samples
        assert torch.equal(sample.tokens.input_ids, fitting[-1].tokens.input_ids)
        assert torch.equal(sample.tokens.labels, fitting[-1].tokens.labels)
        assert sum(medium.frames.numel() for medium in sample.media) == 3 * 32 * 32 * int(
            sample.tokens.vision_mask.sum()
        )
        assert [event.kind for event in item.events] == (["truncated"] if limit < lengths[-1] else [])


def test_evaluation_rows_are_not_trained(tables: Tables) -> None:
    opened = tables(a=[talk(str(n)) for n in range(10)], b=[talk(str(n)) for n in range(7)])
    opened[0] = SampledTable(opened[0].table, np.concatenate([np.arange(10), np.arange(10), np.arange(5)]))
    train, held_out = split_tables(opened, 0.3, seed=1)
    for before, one, other in zip(opened, train, held_out, strict=True):
        assert not set(one.rows) & set(other.rows)
        assert len(set(other.rows)) == len(other.rows) > 0  # once each, however often they would have been trained
        assert set(one.rows) | set(other.rows) == set(before.rows)
    with pytest.raises(UserError, match="Use --eval_dataset_use"):
        split_tables(tables(a=[talk("1")]), 0.3, seed=1)


def test_a_picture_is_decoded_once(make_encoder: MakeEncoder, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official recipe decodes each twice more for lengths, and throws them away."""
    opened, decoded = tables(a=[talk("x", "<image>What?", "It.", image="a.png")]), []
    read = MediaReader.read_pixels
    monkeypatch.setattr(MediaReader, "read_pixels", lambda self, item: decoded.append(item) or read(self, item))
    dataset = ConversationDataset(opened, make_encoder())
    dataset.require_usable_sample()
    assert decoded == []
    assert dataset[0].samples
    assert len(decoded) == 1


def test_a_sample_is_cut_after_an_answer_that_is_trained(make_encoder: MakeEncoder, tables: Tables) -> None:
    """One that ends in answers that are not would hold tokens for nothing; without any other, nothing is left."""
    answers = [("One.", True), ("Two.", False), ("Three. " * 50, True)]
    turns = [
        turn
        for text, loss in answers
        for turn in ({"from": "human", "value": "And?"}, {"from": "gpt", "value": text, "loss": loss})
    ]
    first_untrained = [{**turns[1], "loss": False}, *turns[2:]]
    opened = tables(a=[{"conversations": turns}], b=[{"conversations": [turns[0], *first_untrained]}])
    encoder = make_encoder(60, overlength="truncate_turns")
    item, none = (ConversationDataset([table], encoder, skip_bad_samples=True)[0] for table in opened)
    (kept,) = item.samples
    assert encoder.tokenizer._tokenizer.decode(kept.tokens.input_ids).endswith("One.<|im_end|>\n")
    assert (none.samples, [event.kind for event in none.events]) == ((), ["overlength"])
