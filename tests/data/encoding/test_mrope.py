"""M-RoPE positions against ``get_rope_index`` of every family."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.data.encoding.mrope import VisionSpan, position_ids
from qwenvl.families import FAMILIES, get_family

TEXT = st.integers(1, 5)
IMAGE = st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5))
VIDEO = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.25, 0.5, 1.0, 1.7]))


@pytest.fixture(scope="module")
def stock_models(tiny_checkpoint: Any) -> dict[str, Any]:
    """The stock model of every family."""
    return {
        name: AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny_checkpoint(name)))
        for name in FAMILIES
    }


def test_worked_example() -> None:
    rows = position_ids(7, [VisionSpan(2, (1, 2, 2))])
    assert rows.tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 2, 2, 2, 4],
        [0, 1, 2, 2, 3, 3, 4],
        [0, 1, 2, 3, 2, 3, 4],
    ]


def test_time_is_counted_in_float32_as_transformers_counts_it() -> None:
    """45 x 1.4 is 63 there; in float64 it is 62.99..., which would be cut to 62."""
    rows = position_ids(46, [VisionSpan(0, (46, 1, 1), 1.4)])
    assert rows[1].tolist() == (torch.arange(46) * 1.4).long().tolist()
    assert int(rows[1, 45]) == 63


def published_positions(kinds: list[int], images: Any, videos: Any, speeds: list[float]) -> torch.Tensor:
    """Return int64 [3, T], as the models were trained: whatever follows starts one above the largest position so far.

    As transformers 4.57.6, vLLM and the official recipe have it (``llm_pos_ids_list[-1].max() + 1``).
    """
    grids = {1: iter([(grid, 1.0) for grid in images]), 2: iter(zip(videos, speeds, strict=True))}
    parts: list[torch.Tensor] = []
    for kind, run in itertools.groupby(kinds):
        start = int(parts[-1].max()) + 1 if parts else 0
        if kind == 0:
            parts.append(torch.arange(len(list(run))).expand(3, -1) + start)
            continue
        (t, h, w), speed = next(grids[kind])
        times = (torch.arange(t) * torch.tensor(speed, dtype=torch.float32)).long()
        axes = torch.meshgrid(times, torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + start)
    return torch.cat(parts, dim=1)


def test_text_after_a_clip_stands_behind_its_last_second() -> None:
    """Four patches, 5 s apart at 2 positions a second: text goes on at 31, not at 2 as transformers 5.3 has it."""
    rows = position_ids(18, [VisionSpan(0, (4, 2, 2), 10.0)])
    assert rows[1, [0, 4, 8, 12]].tolist() == [0, 10, 20, 30]
    assert rows[1:, 16:].tolist() == [[31, 32]] * 3


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(max_examples=60)
@given(data=st.data())
def test_equals_get_rope_index(name: str, stock_models: dict[str, Any], data: st.DataObject) -> None:
    """Random interleavings of text, images and videos."""
    model, family = stock_models[name].model, get_family(name)
    kinds: list[int] = [0] * data.draw(TEXT)
    images: list[list[int]] = []
    videos: list[list[int]] = []
    seconds: list[float] = []
    speeds: list[float] = []
    spans: list[VisionSpan] = []
    for block in data.draw(st.lists(st.one_of(IMAGE, VIDEO), max_size=6)):
        t, h, w = block[:3]
        if len(block) == 3:
            images.append([1, 2 * h, 2 * w])
            spans.append(VisionSpan(len(kinds), (1, h, w)))
            kinds += [1] * (h * w)
        else:
            videos.append([t, 2 * h, 2 * w])
            seconds.append(block[3])
            if family.video_layout == "frames":
                for _ in range(t):
                    kinds += [0, 0]
                    spans.append(VisionSpan(len(kinds), (1, h, w)))
                    kinds += [2] * (h * w)
            else:
                speed = model.config.vision_config.tokens_per_second * block[3] if family.timed_positions else 1.0
                speeds.append(speed)
                spans.append(VisionSpan(len(kinds), (t, h, w), speed))
                kinds += [2] * (t * h * w)
        kinds += [0] * data.draw(TEXT)
    extra = {"second_per_grid_ts": torch.tensor(seconds)} if family.timed_positions and seconds else {}
    expected, _ = model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        **extra,
    )
    ours = position_ids(len(kinds), spans)
    if family.video_layout == "clip" and videos:  # transformers from 5.3 on counts the sides of a video alone
        expected = published_positions(kinds, images, videos, speeds)[:, None]
    assert torch.equal(ours[1:], expected[:, 0])
    assert ours[0].tolist() == list(range(len(kinds)))
