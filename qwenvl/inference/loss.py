"""The training loss of single samples, from the stock forward pass of an open model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwenvl.data.encoding.tokenization import IGNORE_INDEX
from qwenvl.data.media.resize import VideoPlan
from qwenvl.inference.generate import ChatModel
from qwenvl.inference.prompts import EvalExample
from qwenvl.models.vision.patchify import Patchify


def example_loss(chat_model: ChatModel, example: EvalExample) -> tuple[float, float]:
    """Return the summed cross entropy of a sample's trained tokens, in nats, and the number of these tokens.

    Where answers have weights, both are weighted sums. Tokens, labels, positions and pixels are those of training. The
    model is called through the stock forward of transformers, so that it may have adapters of any kind.
    """
    device = chat_model.model.device
    tokens = example.encoded.tokens
    kept = (tokens.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)
    with torch.inference_mode():
        logits = chat_model.model(
            input_ids=tokens.input_ids[None].to(device),
            position_ids=tokens.position_ids[1:, None].to(device),
            logits_to_keep=kept.to(device),
            use_cache=False,
            **_pixels(chat_model, example, device),
        ).logits[0]
        targets = tokens.labels[kept + 1].to(device)
        if tokens.weights is None:
            return float(functional.cross_entropy(logits.float(), targets, reduction="sum")), len(kept)
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = tokens.weights[kept + 1]
    return float(losses.cpu() @ weights), float(weights.sum())


def _pixels(chat_model: ChatModel, example: EvalExample, device: torch.device) -> dict[str, Tensor]:
    patchify = Patchify.from_processor(chat_model.processor).to(device)
    inputs: dict[str, Any] = {}
    for kind, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        media = [
            medium
            for medium, plan in zip(example.encoded.media, example.prompt.plans, strict=True)
            if isinstance(plan, VideoPlan) == kind
        ]
        if media:
            frames = torch.cat([medium.frames.flatten() for medium in media]).to(device)
            inputs[pixels] = patchify(frames, [medium.shape for medium in media])
            inputs[grids] = torch.tensor([medium.grid for medium in media], device=device)
    return inputs
