"""Positions of prompts with clips, for stock models: transformers from 5.3 on computes other ones than training.

See :mod:`qwenvl.data.encoding.mrope`. Families whose frames have spans of their own need none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qwenvl.data.encoding.mrope import VisionSpan, position_ids
from qwenvl.families import get_family


def needs_positions(config: Any) -> bool:
    """Return whether a model has to be told the positions of prompts with videos."""
    family = get_family(config.model_type)
    return family.video_layout == "clip" and not family.plain_positions


def clip_positions(config: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return int64 [4, B, T], the positions of training; those of padding are 0.

    Args:
        config: Config of the model.
        inputs: ``input_ids`` and ``attention_mask`` int64 [B, T], the grids of the media, and ``second_per_grid_ts`` as
            the processor gives it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    boxes = {
        config.image_token_id: iter([(grid, 1.0) for grid in _grids(inputs, "image")]),
        config.video_token_id: zip(_grids(inputs, "video"), _steps(config, inputs), strict=True),
    }
    found = torch.zeros(4, *ids.shape, dtype=torch.int64)
    for number, (row, kept) in enumerate(zip(ids, mask, strict=True)):
        own = row[kept].tolist()
        spans = list(_spans(own, boxes, config.vision_config.spatial_merge_size))
        found[:, number, kept] = position_ids(len(own), spans)
    return found


def _grids(inputs: Mapping[str, Any], kind: str) -> list[Sequence[int]]:
    grids = inputs.get(f"{kind}_grid_thw")
    return [] if grids is None else torch.as_tensor(grids).tolist()


def _steps(config: Any, inputs: Mapping[str, Any]) -> list[float]:
    """Return the distance of neighbouring temporal positions of each video."""
    videos = _grids(inputs, "video")
    if not get_family(config.model_type).timed_positions:
        return [1.0] * len(videos)
    return [float(config.vision_config.tokens_per_second) * float(one) for one in inputs["second_per_grid_ts"]]


def _spans(
    ids: Sequence[int], boxes: Mapping[int, Iterator[tuple[Sequence[int], float]]], merge: int
) -> Iterator[VisionSpan]:
    start = 0
    for token, run in groupby(ids):
        if token in boxes:
            (temporal, height, width), step = next(boxes[token])
            yield VisionSpan(start, (temporal, height // merge, width // merge), step)
        start += len(list(run))
