"""The training loss of samples, from the stock forward pass of an open model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from qwenvl.data.encoding.tokenization import IGNORE_INDEX, Tokens
from qwenvl.data.media.resize import VideoPlan
from qwenvl.inference.generate import ChatModel
from qwenvl.inference.prompts import EvalExample
from qwenvl.models.vision.patchify import Patchify

MOST_LOGITS = 1 << 29
"""Most logits of a forward pass; larger batches are split."""


def example_loss(chat_model: ChatModel, example: EvalExample) -> tuple[float, float]:
    """Return the summed cross entropy of a sample's trained tokens, in nats, and the number of these tokens.

    Where answers have weights, both are weighted sums. Tokens, labels, positions and pixels are those of training. The
    model is called through the stock forward of transformers, so that it may have adapters of any kind.
    """
    (losses,) = token_losses(chat_model, [example])
    return weighted_sum(losses, example)


def weighted_sum(losses: Tensor, example: EvalExample) -> tuple[float, float]:
    """Return the sum of the losses of a sample's trained tokens, and their number; with weights, weighted sums."""
    tokens = example.encoded.tokens
    if tokens.weights is None:
        return float(losses.double().sum()), len(losses)
    weights = tokens.weights[_kept(tokens) + 1]
    return float(losses @ weights), float(weights.sum())


def token_losses(chat_model: ChatModel, examples: Sequence[EvalExample]) -> list[Tensor]:
    """Return the cross entropy of each trained token of each sample, in nats: float32 [trained tokens] on the host.

    Args:
        chat_model: Model and processor.
        examples: Samples of one forward pass; padded on the left, so that their answers stand at the same places.
    """
    tokens = [example.encoded.tokens for example in examples]
    longest = max(len(one) for one in tokens)
    kept = [_kept(one) + longest - len(one) for one in tokens]
    places = torch.unique(torch.cat(kept))
    vocabulary = chat_model.model.config.get_text_config().vocab_size
    if len(examples) > 1 and len(examples) * len(places) * vocabulary > MOST_LOGITS:
        half = len(examples) // 2
        return [*token_losses(chat_model, examples[:half]), *token_losses(chat_model, examples[half:])]
    device = chat_model.model.device
    padded: dict[str, Any] = {
        "input_ids": _left([one.input_ids for one in tokens]),
        "position_ids": _left([one.position_ids[1:].T for one in tokens]).permute(2, 0, 1),
    }
    if any(len(one) < longest for one in tokens):
        padded["attention_mask"] = _left([torch.ones(len(one), dtype=torch.long) for one in tokens])
    with torch.inference_mode():
        logits = chat_model.model(
            **{name: value.to(device) for name, value in padded.items()},
            logits_to_keep=places.to(device),
            use_cache=False,
            **_pixels(chat_model, examples, device),
        ).logits
        found = []
        for row, own, one in zip(logits, kept, tokens, strict=True):
            targets = one.labels[_kept(one) + 1].to(device)
            rows = row[torch.searchsorted(places, own).to(device)].float()
            found.append(functional.cross_entropy(rows, targets, reduction="none").cpu())
    return found


def _kept(tokens: Tokens) -> Tensor:
    """Return the positions that predict trained tokens: int64 [trained tokens]."""
    return (tokens.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)


def _left(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of different lengths, with zeros before the shorter ones."""
    return pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)


def _pixels(chat_model: ChatModel, examples: Sequence[EvalExample], device: torch.device) -> dict[str, Tensor]:
    patchify = Patchify.from_processor(chat_model.processor).to(device)
    inputs: dict[str, Any] = {}
    for kind, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        media = [
            medium
            for example in examples
            for medium, plan in zip(example.encoded.media, example.prompt.plans, strict=True)
            if isinstance(plan, VideoPlan) == kind
        ]
        if media:
            frames = torch.cat([medium.frames.flatten() for medium in media]).to(device)
            inputs[pixels] = patchify(frames, [medium.shape for medium in media])
            inputs[grids] = torch.tensor([medium.grid for medium in media], device=device)
    return inputs
