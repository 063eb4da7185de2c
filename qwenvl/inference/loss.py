"""The training loss of single samples, by the stock forward pass of whatever model is open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwenvl.data.encoding.tokenization import IGNORE_INDEX
from qwenvl.data.media.resize import VideoPlan
from qwenvl.inference.generate import Answerer
from qwenvl.inference.prompts import Exercise
from qwenvl.models.vision.patchify import Patchify


def exercise_loss(answerer: Answerer, exercise: Exercise) -> tuple[float, float]:
    """Return the cross entropy of a sample's trained tokens, summed, in nats, and how many they are.

    Where answers have weights, each token counts by its own in both. Tokens, labels, positions and pixels are those of
    training. The model is called as transformers has it, so that adapters of any kind may be in it.
    """
    device = answerer.model.device
    tokens = exercise.encoded.tokens
    kept = (tokens.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1)
    with torch.inference_mode():
        logits = answerer.model(
            input_ids=tokens.input_ids[None].to(device),
            position_ids=tokens.position_ids[1:, None].to(device),
            logits_to_keep=kept.to(device),
            use_cache=False,
            **_pixels(answerer, exercise, device),
        ).logits[0]
        targets = tokens.labels[kept + 1].to(device)
        if tokens.weights is None:
            return float(functional.cross_entropy(logits.float(), targets, reduction="sum")), len(kept)
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = tokens.weights[kept + 1]
    return float(losses.cpu() @ weights), float(weights.sum())


def _pixels(answerer: Answerer, exercise: Exercise, device: torch.device) -> dict[str, Tensor]:
    patchify = Patchify.from_processor(answerer.processor).to(device)
    inputs: dict[str, Any] = {}
    for kind, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        media = [
            medium
            for medium, plan in zip(exercise.encoded.media, exercise.prompt.plans, strict=True)
            if isinstance(plan, VideoPlan) == kind
        ]
        if media:
            frames = torch.cat([medium.frames.flatten() for medium in media]).to(device)
            inputs[pixels] = patchify(frames, [medium.shape for medium in media])
            inputs[grids] = torch.tensor([medium.grid for medium in media], device=device)
    return inputs
