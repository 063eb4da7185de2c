"""Phrases and masks of a sample, by its tokens and by the pixels that the model sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from qwenvl.config import DataArguments
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder
from qwenvl.data.types import Sample
from qwenvl.families import get_family
from qwenvl.tasks.grounding.masks import mask_of, shares
from qwenvl.tasks.grounding.phrases import MaskReader, Region
from qwenvl.utils.errors import Origin, SampleError

SIDE = 64
ALL = {"size": [SIDE, SIDE], "counts": [0, SIDE * SIDE]}
Opened = tuple[SampleEncoder, Any]


def _open(checkpoint: Path, family: str) -> Opened:
    processor = AutoProcessor.from_pretrained(checkpoint)
    arguments = DataArguments(dataset_use="d")
    config = AutoConfig.from_pretrained(checkpoint)
    encoder = build_encoder(processor, config, get_family(family), arguments, 4096)
    reader = MaskReader(encoder.tokenizer, encoder.template.turn_end, encoder.settings.merge_size, (8,))
    return replace(encoder, targets=reader), processor


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "qwen3_5"])
def opened(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Opened:
    return _open(tiny_checkpoint(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3(tiny_checkpoint: Callable[..., Path]) -> Opened:
    return _open(tiny_checkpoint("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (SIDE, SIDE)).save(path / "a.png")
    return path


def _sample(folder: Path, answer: str, *masks: Any, **fields: Any) -> Sample:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    record = {"image": "a.png", "conversations": turns, "masks": list(masks), **fields}
    return Sample(Origin("scenes", "scenes.jsonl", 7), record, str(folder))


def _read(opened: Opened, sample: Sample) -> tuple[Plan, tuple[Region, ...]]:
    plan = opened[0].plans(sample)[0]
    regions: tuple[Region, ...] = opened[0].encode([plan], sample)[0].target
    return plan, regions


WORDS = st.text(st.sampled_from("ab c,. \n\tdé漢😀🇪🇺½"), min_size=1, max_size=30)


@settings(max_examples=60)
@given(WORDS, st.data())
def test_tokens_are_those_that_hold_bytes_of_the_phrase(opened, folder, text, data) -> None:
    """A character of a token's name is one byte of the text it stands for, in the byte-level tokenizers of Qwen."""
    inside = [place for place, one in enumerate(text) if not one.isspace()]
    if not inside:
        return
    start = data.draw(st.sampled_from(inside))
    stop = data.draw(st.sampled_from([place for place in inside if place >= start])) + 1
    plan, (region,) = _read(opened, _sample(folder, text, {"span": [start, stop], "segmentation": ALL}))
    assert region.place.phrase == text[start:stop]
    first, last = plan.rendering.spans[0]
    answer = plan.rendering.text.rindex(text.strip(), 0, last - len(opened[0].template.turn_end))
    answer -= len(text) - len(text.lstrip())
    border = len(plan.rendering.text[first : answer + start].encode())
    wanted = range(border, border + len(text[start:stop].encode()))
    place = int(np.flatnonzero(plan.tokens.labels.numpy() != -100)[0])
    found, seen = [], 0
    while seen < wanted.stop:
        name = opened[1].tokenizer.convert_ids_to_tokens(int(plan.tokens.input_ids[place]))
        if seen + len(name) > wanted.start:
            found.append(place)
        seen, place = seen + len(name), place + 1
    assert region.place.tokens == tuple(found)


def test_phrases_and_spans_say_the_same(opened, folder) -> None:
    text = "A red car, and a blue car."
    _, by_phrase = _read(opened, _sample(folder, text, {"phrase": " red car", "segmentation": ALL}))
    _, by_span = _read(opened, _sample(folder, text, {"span": [2, 9], "segmentation": ALL, "phrase": None}))
    assert by_phrase[0].place.tokens == by_span[0].place.tokens
    assert by_phrase[0].place.phrase == by_span[0].place.phrase == "red car"


def test_accents_in_two_characters_move_nothing(opened, folder) -> None:
    """The tokenizer composes them (NFC): it counts fewer characters than the answer has."""
    text = "cafe\u0301 cre\u0300me au lait"
    plan, (region,) = _read(opened, _sample(folder, text, {"phrase": "au lait", "segmentation": ALL}))
    assert opened[1].tokenizer.decode(plan.tokens.input_ids[list(region.place.tokens)]).strip() == "au lait"


def test_an_answer_after_thinking_is_found_where_the_template_puts_it(tiny_checkpoint, folder) -> None:
    opened = _open(tiny_checkpoint("qwen3_5"), "qwen3_5")
    text = "<think>\nA dog?\n</think>\n\nA dog and a cat."
    turns = [
        {"from": "human", "value": "<image>What?"},
        {"from": "gpt", "value": text},
        {"from": "human", "value": "And now?"},
        {"from": "gpt", "value": "Two."},
    ]
    mask = {"span": [text.index("a cat"), text.index("a cat") + 5], "answer": 0, "segmentation": ALL}
    plan, (region,) = _read(opened, _sample(folder, "", mask, conversations=turns))
    assert opened[1].tokenizer.decode(plan.tokens.input_ids[list(region.place.tokens)]).strip() == "a cat"
    thought = {"span": [8, 13], "answer": 0, "segmentation": ALL}
    if "A dog?" not in plan.rendering.text:  # thoughts of earlier turns are left out
        with pytest.raises(SampleError, match="omits or changes its words"):
            _read(opened, _sample(folder, "", thought, conversations=turns))


def test_images_are_counted_as_they_are_shown_and_videos_are_not(qwen3, tmp_path) -> None:
    for name, size in (("a.png", (64, 64)), ("b.png", (96, 64))):
        Image.new("RGB", size).save(tmp_path / name)
    turns = [{"from": "human", "value": "<image><video>then<image>?"}, {"from": "gpt", "value": "Two cats."}]
    mask = {"phrase": "cats", "image": 1, "segmentation": {"size": [64, 96], "counts": [0, 64 * 96]}}
    frames = ["a.png"] * 4
    record = {"image": ["a.png", "b.png"], "video": [frames], "conversations": turns, "masks": [mask]}
    plan, (region,) = _read(qwen3, Sample(Origin("d", "f", 1), record, str(tmp_path)))
    assert region.place.medium == 2
    place, count = region.place.image_start, region.place.grid[0] * region.place.grid[1]
    tokens = qwen3[1].tokenizer.convert_ids_to_tokens(plan.tokens.input_ids.tolist())
    assert plan.tokens.vision_mask[place : place + count].all()
    assert (tokens[place - 1], tokens[place + count]) == ("<|vision_start|>", "<|vision_end|>")
    assert "<|vision_start|>" not in tokens[place:]
    height, width = plan.media[2].resized
    assert region.place.grid[0] * width == region.place.grid[1] * height
    assert [target.shape for target in region.targets] == [(round(8 * height / width), 8)]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_mask_lies_on_its_thing_in_the_pixels_that_the_model_sees(qwen3, tmp_path, orientation) -> None:
    """A picture that a camera stored turned, not square, and resized: the white thing is where the mask says."""
    shown = Image.new("RGB", (150, 90))
    shown.paste((255, 255, 255), (20, 30, 110, 50))
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = shown.transpose(turn[orientation]) if orientation > 1 else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    mask = mask_of(np.asarray(shown)[..., 0] > 0)
    written = {"size": list(mask.size), "counts": list(mask.runs)}
    sample = _sample(tmp_path, "A bar.", {"phrase": "bar", "segmentation": written})
    encoded = qwen3[0].encode([qwen3[0].plans(sample)[0]], sample)[0]
    frame, (region,) = encoded.media[0].frames[0, ..., 0].numpy() / 255, encoded.target
    assert frame.shape != region.mask.size == (90, 150)
    assert np.abs(frame - shares(region.mask.pixels(), frame.shape)).mean() < 0.02
    height, width = region.targets[0].shape
    assert np.abs(shares(frame, (height, width)) - region.targets[0]).max() < 0.1 < region.targets[0].max()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("cat", "it is 'cat', not an object with phrase, span"),
        ({"phrase": "cat", "segmentaton": ALL}, "Did you mean 'segmentation'?"),
        ({"segmentation": ALL}, "it needs exactly one of 'phrase' and 'span'"),
        ({"phrase": "cat", "span": [0, 2], "segmentation": ALL}, "it needs exactly one of 'phrase' and 'span'"),
        ({"phrase": "dog", "segmentation": ALL}, "occurs in the answer 0 times"),
        ({"phrase": "a", "segmentation": ALL}, "occurs in the answer 2 times. Give 'span'"),
        ({"phrase": " ", "segmentation": ALL}, "not words of an answer"),
        ({"span": [0, 99], "segmentation": ALL}, "not [first, last + 1] in the 6 characters"),
        ({"span": [1, 2], "segmentation": ALL}, "contains only white space"),
        ({"phrase": "cat", "image": 1, "segmentation": ALL}, "'image' is 1, but the sample has 1 images"),
        ({"phrase": "cat", "answer": 1, "segmentation": ALL}, "'answer' is 1, but the sample has 1 assistant turns"),
        ({"phrase": "cat", "segmentation": {"size": [1, 1], "counts": [0, 1]}}, "shown 64 pixels high and 64 wide"),
    ],
)
def test_mistakes_are_named_with_their_place(qwen3, folder, mask, expected) -> None:
    good = {"phrase": "cat", "segmentation": ALL}
    with pytest.raises(SampleError) as caught:
        _read(qwen3, _sample(folder, "a cat.", good, mask))
    assert str(caught.value).startswith("dataset 'scenes', scenes.jsonl:7: mask 1 of 'masks': ")
    assert expected in str(caught.value)


def test_samples_without_masks_and_spans_that_move_are_refused(qwen3, folder) -> None:
    with pytest.raises(SampleError, match="'masks' is \\[\\]: --task grounding needs a list"):
        qwen3[0].plans(_sample(folder, "a cat."))[0]
    mask = {"span": [0, 5], "segmentation": ALL}
    with pytest.raises(SampleError, match="'span' cannot be used with bbox_format"):
        qwen3[0].plans(_sample(folder, "a cat.", mask, bbox_format="pixel"))
    with pytest.raises(SampleError, match="'span' cannot be used with bbox_format or objects"):
        qwen3[0].plans(_sample(folder, "a cat <bbox>.", mask, objects={"bbox": [[1, 1]]}))
    assert len(replace(qwen3[0], targets=None).plans(_sample(folder, "a cat.", "nonsense"))[0].tokens)


def test_answers_that_are_not_trained_do_not_move_phrases(opened, folder) -> None:
    turns = [
        {"from": "human", "value": "<image>What?"},
        {"from": "gpt", "value": "A dog.", "loss": False},
        {"from": "human", "value": "No."},
        {"from": "gpt", "value": "A red car."},
    ]
    mask = {"phrase": "red car", "answer": 1, "segmentation": ALL}
    plan, (region,) = _read(opened, _sample(folder, "", mask, conversations=turns))
    assert opened[1].tokenizer.decode(plan.tokens.input_ids[list(region.place.tokens)]).strip() == "red car"
    untrained = {"phrase": "dog", "answer": 0, "segmentation": ALL}
    with pytest.raises(SampleError, match="its answer is not trained"):
        _read(opened, _sample(folder, "", untrained, conversations=turns))
