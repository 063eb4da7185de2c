"""Comparison of a quantized model with the one it was made from: answers, and the log-probabilities of their tokens.

The quantized model answers held-out samples greedily; the whole model then gives the log-probability of each token of
these answers behind the same prompt, and its own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwenvl.inference.generate import ChatModel, Decoding, encode_prompts
from qwenvl.inference.prompts import EvalExample, Prompt
from qwenvl.utils.errors import UserError


@dataclass(frozen=True)
class Heard:
    """A greedy answer.

    Args:
        ids: Ids of its tokens, without the one that ends the turn.
        logprobs: Log-probability of each token.
        prompt_tokens: Number of tokens of its prompt.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Difference:
    """Difference of a quantized model from the one it was made from.

    Args:
        samples: Number of compared samples.
        tokens: Number of compared tokens.
        same_prompt: Number of samples whose prompts have the same number of tokens.
        same: Number of samples whose whole answers are the same.
        same_first: Number of samples whose answers begin with the same token.
        mean: Mean absolute difference of a token's log-probability, in nats.
        largest: Largest of these differences.
        shift: Mean difference: below 0, the quantized model is more certain of its answers than the whole one.
    """

    samples: int
    tokens: int
    same_prompt: int
    same: int
    same_first: int
    mean: float
    largest: float
    shift: float

    def lines(self) -> list[tuple[str, str]]:
        """Return the figures with their names."""
        return [
            ("samples", f"{self.samples:,}"),
            ("tokens of answers", f"{self.tokens:,}"),
            ("same number of prompt tokens", self._share(self.same_prompt)),
            ("same answer", self._share(self.same)),
            ("same first token", self._share(self.same_first)),
            ("log-probability of a token, mean difference", f"{self.mean:.4f} nats"),
            ("log-probability of a token, largest difference", f"{self.largest:.4f} nats"),
            ("log-probability of a token, unquantized minus quantized", f"{self.shift:+.4f} nats"),
        ]

    def _share(self, count: int) -> str:
        return f"{count:,} ({100 * count / self.samples:.1f}%)"


def require_same_prompts(heard: Sequence[Heard], own: Sequence[Heard]) -> None:
    """Refuse a quantized model whose prompts have other numbers of tokens.

    Raises:
        UserError: One has.
    """
    for found, one in zip(heard, own, strict=True):
        if found.prompt_tokens != one.prompt_tokens:
            raise UserError(
                f"The quantized model was asked {found.prompt_tokens} tokens where the whole one is asked "
                f"{one.prompt_tokens}: its reader has other limits or another template. It is not kept."
            )


def difference(
    examples: Sequence[EvalExample], heard: Sequence[Heard], own: Sequence[Heard], whole: ChatModel
) -> Difference:
    """Compare answers of a quantized model with the whole model.

    Args:
        examples: Samples.
        heard: Answer of the quantized model to each.
        own: Answer of the whole model to each.
        whole: Model that the quantized one was made from.

    Raises:
        UserError: The quantized model says nothing.
    """
    scored = [answer(whole, example.prompt, 1, found.ids) for example, found in zip(examples, heard, strict=True)]
    pairs = [
        (exact, found)
        for one, other in zip(scored, heard, strict=True)
        for exact, found in zip(one.logprobs, other.logprobs, strict=True)
    ]
    if not pairs:
        raise UserError("All answers of the quantized model are empty, so that there is nothing to compare.")
    apart = np.array([exact - found for exact, found in pairs])
    both = list(zip(heard, own, strict=True))
    return Difference(
        samples=len(both),
        tokens=len(apart),
        same_prompt=sum(found.prompt_tokens == one.prompt_tokens for found, one in both),
        same=sum(found.ids == one.ids for found, one in both),
        same_first=sum(found.ids[:1] == one.ids[:1] for found, one in both),
        mean=float(np.abs(apart).mean()),
        largest=float(np.abs(apart).max()),
        shift=float(apart.mean()),
    )


def answer(chat_model: ChatModel, prompt: Prompt, tokens: int, given: Sequence[int] | None = None) -> Heard:
    """Return the greedy answer of a model to a prompt, or the log-probabilities of a given one.

    Args:
        chat_model: Model and processor.
        prompt: Prompt.
        tokens: Most tokens of the answer.
        given: Ids of the answer to be given; None for the model's own.
    """
    inputs = encode_prompts(chat_model, [prompt]).to(chat_model.model.device)
    length = inputs["input_ids"].shape[1]
    if given == ():
        return Heard((), (), length)
    options: dict[str, Any] = Decoding(tokens if given is None else len(given)).options()
    if given is not None:
        options["prefix_allowed_tokens_fn"] = lambda _, ids: [given[len(ids) - length]]
    with torch.no_grad():
        output = chat_model.model.generate(
            **inputs, **options, repetition_penalty=1.0, return_dict_in_generate=True, output_logits=True
        )
    ids = output.sequences[0, length:].tolist()
    ends = torch.as_tensor(chat_model.model.generation_config.eos_token_id).reshape(-1).tolist()
    ids = ids[:-1] if ids[-1] in ends else ids
    logits = torch.stack(output.logits)[: len(ids), 0].float()
    found = torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids]
    return Heard(tuple(ids), tuple(found.tolist()), length)
