"""The weights of turns: on which tokens of which training row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.types import Sample
from qwenvl.tasks.heads.labels import LabelReader
from qwenvl.utils.errors import Origin, SampleError
from tests.data.encoding.test_encoder import build, encoder, talk

__all__ = ["encoder"]


def weights_by_answer(plan: Plan, tokenizer: Any) -> list[tuple[str, set[float]]]:
    """Return the trained text of each answer of a row, and the weights of its tokens."""
    tokens, found = plan.tokens, list[tuple[str, set[float]]]()
    assert tokens.weights is not None and tokens.weights.dtype == torch.float32
    for start, stop in pairwise([*tokens.starts, len(tokens)]):
        trained = [place for place in range(start, stop) if tokens.labels[place] != -100]
        text = tokenizer.decode([int(tokens.input_ids[place]) for place in trained])
        found.append((text, {float(tokens.weights[place]) for place in trained}))
    assert not tokens.weights[tokens.labels == -100].any()
    return found


@pytest.mark.parametrize("history", ["exact", "as_rendered"])
@pytest.mark.parametrize("thoughts", [False, True])
def test_weights_are_on_the_tokens_of_their_turns(
    history: Any, thoughts: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In one row and, where a template leaves out earlier thoughts, in several; an image stands before them."""
    Image.new("RGB", (70, 90)).save(tmp_path / "a.png")
    checkpoint = tiny_checkpoint("qwen3_5")
    encoder = replace(build(checkpoint), history=history)
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    answers = [f"{'<think>hm</think>' * thoughts}{word}" for word in ("one", "two", "three")]
    turns = [
        turn
        for text, weight in zip(answers, (0.5, None, 3), strict=True)
        for turn in ({"from": "human", "value": "Q"}, {"from": "gpt", "value": text, "weight": weight})
    ]
    turns[0] = {"from": "human", "value": "<image>Q"}
    sample = Sample(Origin("d", "f", 1), {"conversations": turns, "image": "a.png"}, str(tmp_path))
    plans = encoder.plans(sample)
    assert len(plans) == (3 if history == "exact" else 1)
    weighted = [one for plan in plans if plan.tokens.weights is not None for one in weights_by_answer(plan, tokenizer)]
    expected = [("one", {0.5}), ("two", {1.0}), ("three", {3.0})]
    if history == "exact":  # a row in which all weights are 1 has none
        assert plans[1].tokens.weights is None
        del expected[1]
    assert [weight for _, weight in weighted] == [weight for _, weight in expected]
    assert all(word in text for (text, _), (word, _) in zip(weighted, expected, strict=True))
    assert encoder.measure(sample).weighted == 2
    assert encoder.measure(sample).trained_tokens == sum(int((plan.tokens.labels != -100).sum()) for plan in plans)


def test_weights_of_1_are_none(encoder: SampleEncoder) -> None:
    sample = talk("Q", "A", "R", "B")
    for turn in sample.record["conversations"][1::2]:
        turn["weight"] = 1.0
    (plan,) = encoder.plans(sample)
    assert plan.tokens.weights is None and plan.rendering.weights == () and encoder.measure(sample).weighted == 0


def test_a_part_of_an_answer_has_the_weight_of_its_turn(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = tiny_checkpoint("qwen3_5")
    encoder = replace(build(checkpoint), loss_on="answers")
    sample = talk("Q", "<think>hm</think>A")
    sample.record["conversations"][1]["loss_scale"] = 0.25
    (plan,) = encoder.plans(sample)
    assert plan.tokens.weights is not None
    assert set(plan.tokens.weights[plan.tokens.labels != -100].tolist()) == {0.25}
    assert set(plan.tokens.weights[plan.tokens.labels == -100].tolist()) == {0.0}


def test_weights_are_no_part_of_a_task(tiny_checkpoint: Callable[..., Path]) -> None:
    encoder = replace(build(tiny_checkpoint("qwen3_vl")), targets=LabelReader("classification", ("a", "b")))
    sample = talk("Q", "A", label="a")
    encoder.plans(sample)
    sample.record["conversations"][1]["weight"] = 0.5
    with pytest.raises(SampleError, match="a turn has a weight other than 0 and 1, which --task does not read"):
        encoder.plans(sample)
