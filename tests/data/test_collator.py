"""Batches: padded and flattened."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.data.collator import Collator, for_model
from qwenvl.data.encoding.encoded import EncodedSample, Event, Item, Medium
from qwenvl.data.encoding.tokenization import IGNORE_INDEX, Tokens
from qwenvl.utils.errors import Origin, SampleError

PAD = 9


def sample(length: int, media: int = 0) -> EncodedSample:
    ids = torch.arange(length) + 10
    labels = torch.where(torch.arange(length) > 0, ids, IGNORE_INDEX)
    positions = torch.arange(length).expand(4, length) + torch.arange(4)[:, None]
    tokens = Tokens(ids, labels, positions, torch.arange(length) < media)
    if not media:
        return EncodedSample(tokens)
    picture = Medium(torch.full((1, 2, 2, 3), length, dtype=torch.uint8), (1, 2, length))
    return EncodedSample(tokens, (picture,) * media)


LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=5)


@given(LENGTHS)
def test_flattened_rows_hold_every_sample_whole(lengths: list[int]) -> None:
    samples = [sample(length, media=length % 2) for length in lengths]
    batch = Collator(PAD, flatten=True)([Item((one,)) for one in samples])
    borders = batch["cu_seq_lens_q"].tolist()
    assert borders == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == max(lengths)
    assert "attention_mask" not in batch
    for one, start, stop in zip(samples, borders, borders[1:], strict=False):
        assert torch.equal(batch["input_ids"][0, start:stop], one.tokens.input_ids)
        assert torch.equal(batch["position_ids"][:, 0, start:stop], one.tokens.position_ids)
        assert batch["labels"][0, start] == IGNORE_INDEX
    odd = [length for length in lengths if length % 2]
    shown = torch.cat([one.tokens.vision_mask for one in samples])
    assert torch.equal(batch["vision_rows"], shown.nonzero().flatten()) and len(batch["vision_rows"]) == len(odd)
    assert batch.get("media", ()) == tuple((1, 1, 2, length) for length in odd)
    assert ("pixels" in batch) == bool(odd)
    if odd:
        assert batch["pixels"].tolist() == [length for length in odd for _ in range(12)]


@given(LENGTHS)
def test_padding_is_masked_and_never_trained(lengths: list[int]) -> None:
    samples = [sample(length, media=length % 2) for length in lengths]
    batch = Collator(PAD, flatten=False)([Item((one,)) for one in samples])
    assert batch["input_ids"].shape == (len(lengths), max(lengths))
    assert batch["position_ids"].shape == (4, len(lengths), max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == PAD).all()
    assert (batch["labels"][padding] == IGNORE_INDEX).all()
    shown = torch.zeros_like(padding).flatten().index_fill_(0, batch["vision_rows"], True).view_as(padding)
    for row, one in enumerate(samples):
        assert torch.equal(batch["position_ids"][:, row, : lengths[row]], one.tokens.position_ids)
        assert torch.equal(shown[row, : lengths[row]], one.tokens.vision_mask) and not shown[row, lengths[row] :].any()


def test_samples_left_out_leave_a_batch_that_trains_nothing() -> None:
    event = Event("bad", "d", "broken")
    for flatten in (True, False):
        batch = Collator(PAD, flatten)([Item(events=(event,)), Item()])
        assert batch["input_ids"].shape == (1, 2)
        assert (batch["labels"] == IGNORE_INDEX).all()
        assert batch["events"] == [event]
        assert batch["error"] is None


def test_errors_and_packed_rows_pass_through() -> None:
    error = SampleError("missing_file", "gone")
    later = SampleError("missing_file", "gone too")
    batch = Collator(PAD, flatten=True)([Item((sample(3), sample(4))), Item(error=error), Item(error=later)])
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 7]
    assert batch["max_length_k"] == 4
    assert batch["num_samples"] == 2
    assert batch["error"] is error
    with pytest.raises(SampleError, match="gone") as caught:
        for_model(batch)
    assert caught.value is error


@pytest.mark.parametrize("flatten", [True, False])
def test_a_model_is_not_told_of_samples(flatten: bool) -> None:
    batch = Collator(PAD, flatten)([Item((sample(3, media=1),), (Event("bad", "d", "broken"),))])
    assert set(batch) - set(for_model(batch)) == {"events", "error", "origins"}
    assert for_model(batch)["input_ids"] is batch["input_ids"]


@pytest.mark.parametrize("flatten", [True, False])
def test_targets_and_origins_of_samples_are_kept_in_order(flatten: bool) -> None:
    samples = [replace(sample(3), target=number, origin=Origin("d", "f", number)) for number in range(3)]
    batch = Collator(PAD, flatten)([Item((samples[0],)), Item(), Item((samples[1], samples[2]))])
    assert batch["sample_targets"] == [0, 1, 2]
    assert batch["origins"] == [Origin("d", "f", number) for number in range(3)]
    assert batch["num_samples"] == 3
    assert Collator(PAD, flatten)([Item()])["sample_targets"] == []  # whether there is a task cannot be told
    without = Collator(PAD, flatten)([Item((sample(3),))])
    assert "sample_targets" not in without
    assert without["origins"] == []


def test_a_filler_is_one_row_of_two_tokens_that_are_attended() -> None:
    batch = Collator(PAD, flatten=False)([Item()])
    assert (batch["num_samples"], len(batch["vision_rows"])) == (0, 0)
    assert batch["input_ids"].tolist() == [[PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1]]
    assert batch["position_ids"].tolist() == [[[0, 1]]] * 4
    assert "media" not in batch


@pytest.mark.parametrize("flatten", [False, True])
def test_weights_are_there_where_a_sample_has_any(flatten: bool) -> None:
    plain, other = sample(3), sample(4)
    weights = torch.tensor([0.0, 0.5, 0.5, 2.0])
    weighted = replace(other, tokens=replace(other.tokens, weights=weights))
    collate = Collator(PAD, flatten=flatten)
    assert "loss_weights" not in collate([Item((plain, other))])
    found = collate([Item((plain,)), Item((weighted,))])["loss_weights"]
    ours, padding = [0.0, 1.0, 1.0], [] if flatten else [0.0]
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [*ours, *padding, *weights.tolist()]
