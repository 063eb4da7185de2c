"""Samples for the comparison of a finished model with training, as inputs of a stock model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import EncodedSample, Plan
from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.types import Sample
from qwenvl.models.vision.patchify import Patchify
from qwenvl.utils.errors import SampleError

_LOOKED_AT = 64  # rows among which the shortest are taken
_LONGEST = 2048  # tokens of a sample to compare with


@dataclass(frozen=True)
class Case:
    """A sample of the comparison.

    Args:
        plan: Plan of the sample.
        encoded: Tokens and pixels of the sample.
    """

    plan: Plan
    encoded: EncodedSample


def short_cases(dataset: ConversationDataset) -> Iterator[Case]:
    """Yield the shortest sample with media and the shortest without, of the first rows, as far as there are any."""
    shortest: dict[bool, tuple[Plan, Sample]] = {}
    for index in range(min(_LOOKED_AT, len(dataset))):
        for sample, plan in _plans(dataset, index):
            best = shortest.get(bool(plan.media))
            if len(plan.tokens) <= _LONGEST and (best is None or len(plan.tokens) < len(best[0].tokens)):
                shortest[bool(plan.media)] = (plan, sample)
    for plan, sample in shortest.values():
        yield Case(plan, dataset.encoder.encode([plan], sample)[0])


def _plans(dataset: ConversationDataset, index: int) -> Iterator[tuple[Sample, Plan]]:
    try:
        samples = dataset.samples(index)
    except SampleError:  # which training has counted already
        return
    for sample in samples:
        try:
            plans = dataset.encoder.plans(sample)
        except SampleError:
            continue
        for plan in plans:
            yield sample, plan


def stock_inputs(case: Case, patchify: Patchify, *, one_span: bool) -> dict[str, Tensor]:
    """Return a stock model's inputs for a sample.

    The model computes positions itself, except for videos in one span, whose text transformers from 5.3 on places
    differently (:mod:`qwenvl.data.encoding.mrope`).

    Args:
        case: Sample.
        patchify: Module that cuts frames into patches.
        one_span: Whether all tokens of a video are in one span.
    """
    inputs = {"input_ids": case.plan.tokens.input_ids[None]}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        chosen = [
            (plan, medium)
            for plan, medium in zip(case.plan.media, case.encoded.media, strict=True)
            if isinstance(plan, VideoPlan) == (kind == "video")
        ]
        if chosen:
            patches = [patchify.cpu()(medium.frames.flatten(), [medium.shape]) for _, medium in chosen]
            inputs[f"pixel_values{suffix}"] = torch.cat(patches)
            inputs[f"{kind}_grid_thw"] = torch.tensor([plan.grid for plan, _ in chosen])
    videos = [plan for plan in case.plan.media if isinstance(plan, VideoPlan)]
    if videos:
        seconds = [patchify.temporal_patch_size / video.sampled_fps for video in videos]
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
        if one_span:
            inputs["position_ids"] = case.plan.tokens.position_ids[1:, None]
    return inputs
