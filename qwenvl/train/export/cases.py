"""Samples for the comparison of a finished model with training, as inputs of a stock model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import EncodedSample, Plan
from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.types import Sample
from qwenvl.models.vision.patchify import Patchify
from qwenvl.utils.errors import SampleError

_LOOKED_AT = 64  # rows, evenly spread over a dataset, among which the shortest are taken
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


def short_cases(datasets: Sequence[ConversationDataset]) -> list[Case]:
    """Return the shortest sample with clips, with images alone, and without media, among rows of the datasets.

    Args:
        datasets: Datasets; a later one is asked for the kinds of samples that the earlier ones lack.
    """
    found: dict[str, Case] = {}
    for dataset in datasets:
        shortest: dict[str, tuple[Plan, Sample]] = {}
        for index in np.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset))).round().astype(int).tolist():
            for sample, plan in _plans(dataset, index):
                kind, tokens = _kind(plan), len(plan.tokens)
                if tokens <= _LONGEST and (kind not in shortest or tokens < len(shortest[kind][0].tokens)):
                    shortest[kind] = (plan, sample)
        for kind, (plan, sample) in shortest.items():
            if kind not in found:
                found[kind] = Case(plan, dataset.encoder.encode([plan], sample)[0])
    return list(found.values())


def _kind(plan: Plan) -> str:
    if any(isinstance(medium, VideoPlan) for medium in plan.media):
        return "clips"
    return "images" if plan.media else "text"


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
