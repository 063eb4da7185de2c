"""The comparison of a quantized model: log-probabilities against those of one forward pass over the whole row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvl.cli.export.check import Heard, answer, difference, require_same_prompts
from qwenvl.cli.inference_args import AskArguments, open_asking_encoder, open_model
from qwenvl.data.types import Origin, Sample
from qwenvl.inference.generate import ChatModel, encode_prompts
from qwenvl.inference.prompts import EvalExample, open_example
from qwenvl.utils.errors import UserError
from tests.data.media.video.test_decode import make_video


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def opened(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> tuple[ChatModel, list[EvalExample]]:
    """A model, and samples with an image, a clip and text alone."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(tmp_path / "a.png")
    make_video(tmp_path / "clip.mp4")
    records = [
        {"image": "a.png", "conversations": _turns("<image>What?")},
        {"video": "clip.mp4", "conversations": _turns("<video>Where?")},
        {"conversations": _turns("Why?")},
    ]
    arguments = AskArguments(model_name_or_path=str(tiny_checkpoint(request.param)), device="cpu")
    encoder = open_asking_encoder(arguments)
    samples = [Sample(Origin("d", "f", n), record, str(tmp_path)) for n, record in enumerate(records)]
    return open_model(arguments, encoder), [open_example(sample, encoder) for sample in samples]


def _turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": json.dumps(question)}]


def test_log_probabilities_are_those_of_the_tokens_behind_the_prompt(
    opened: tuple[ChatModel, list[EvalExample]],
) -> None:
    whole, examples = opened
    for example in examples:
        own = answer(whole, example.prompt, 6)
        assert len(own.ids) == 6
        given = tuple(reversed(own.ids))
        scored = answer(whole, example.prompt, 6, given)
        assert scored.ids == given and scored.prompt_tokens == own.prompt_tokens
        first = encode_prompts(whole, [example.prompt])
        with torch.no_grad():
            logits = whole.model(**first, use_cache=False).logits[0, -1].float()
        assert scored.logprobs[0] == pytest.approx(float(torch.log_softmax(logits, -1)[given[0]]), abs=1e-4)
        assert sum(scored.logprobs) < sum(own.logprobs)  # what it would not have said is less likely
        assert answer(whole, example.prompt, 6, own.ids).logprobs == pytest.approx(own.logprobs, abs=1e-5)


def test_figures_are_those_of_the_tokens(opened: tuple[ChatModel, list[EvalExample]]) -> None:
    whole, examples = opened
    heard = [answer(whole, example.prompt, 4) for example in examples]
    found = difference(examples, heard, heard, whole)
    assert (found.samples, found.tokens, found.same_prompt, found.same, found.same_first) == (3, 12, 3, 3, 3)
    assert found.largest < 1e-5
    surer = [replace(one, logprobs=tuple(value + 0.5 for value in one.logprobs)) for one in heard]
    surer[0] = Heard(surer[0].ids[:2], surer[0].logprobs[:2], surer[0].prompt_tokens + 1)
    found = difference(examples, surer, heard, whole)
    assert (found.tokens, found.same_prompt, found.same, found.same_first) == (10, 2, 2, 3)
    assert (found.mean, found.largest, found.shift) == pytest.approx((0.5, 0.5, -0.5), abs=1e-4)


def test_other_prompts_and_empty_answers_are_not_compared(opened: tuple[ChatModel, list[EvalExample]]) -> None:
    whole, examples = opened
    heard = [answer(whole, example.prompt, 2) for example in examples]
    require_same_prompts(heard, heard)
    with pytest.raises(UserError, match="has other limits or another template"):
        require_same_prompts([replace(one, prompt_tokens=one.prompt_tokens + 1) for one in heard], heard)
    with pytest.raises(UserError, match="nothing to compare"):
        difference(examples, [Heard((), (), one.prompt_tokens) for one in heard], heard, whole)
