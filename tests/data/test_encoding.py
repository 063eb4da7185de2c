"""A sample's whole way, real media files in, against the stock model's own positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.arguments import DataArguments
from qwenvl.data.processor import build_encoder
from qwenvl.data.sizes import VideoPlan
from qwenvl.data.types import Origin, Sample
from qwenvl.utilities.errors import SampleError
from qwenvl.utilities.families import FAMILIES, get_family
from tests.patches import patches_of


def write_video(path: Path, frames: int, fps: int) -> None:
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(frames):
            picture = np.full((64, 96, 3), 8 * number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_two_videos_and_a_picture_stand_where_the_stock_model_puts_them(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Videos of different length and frame rate: each has its own seconds a patch (2, and 1) where time is counted."""
    write_video(tmp_path / "slow.mp4", frames=8, fps=1)
    write_video(tmp_path / "fast.mp4", frames=40, fps=10)
    Image.new("RGB", (70, 90)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<video>then<image>and<video>?"}, {"from": "gpt", "value": "Yes."}]
    record = {"video": ["slow.mp4", "fast.mp4"], "image": "a.png", "conversations": turns}
    checkpoint = tiny_checkpoint(family)
    config = AutoConfig.from_pretrained(checkpoint)
    limits = DataArguments(dataset_use="d", video_max_pixels=8 * 64 * 96, video_min_pixels=8 * 32 * 32)
    encoder = build_encoder(AutoProcessor.from_pretrained(checkpoint), config, get_family(family), limits, 4096)
    sample = Sample(Origin("d", "f", 1), record, str(tmp_path))
    plan = encoder.plan(sample)
    videos = [media for media in plan.media if isinstance(media, VideoPlan)]
    assert [len(video.indices) for video in videos] == [8, 8]
    seconds = [2 / video.sampled_fps for video in videos]
    assert seconds == [2.0, 1.0]

    kinds = (plan.tokens.input_ids == config.image_token_id).int() + 2 * (
        plan.tokens.input_ids == config.video_token_id
    ).int()
    assert torch.equal(kinds > 0, plan.tokens.vision_mask)
    timed = {"second_per_grid_ts": torch.tensor(seconds)} if get_family(family).timed_positions else {}
    expected, _ = AutoModelForImageTextToText.from_config(config).model.get_rope_index(
        plan.tokens.input_ids[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=torch.tensor([media.grid for media in plan.media if not isinstance(media, VideoPlan)]),
        video_grid_thw=torch.tensor([video.grid for video in videos]),
        **timed,
    )
    assert torch.equal(plan.tokens.position_ids[1:], expected[:, 0])

    encoded = encoder.encode(plan, sample)
    assert [len(medium.frames) for medium in encoded.media] == [8, 1, 8]
    assert [medium.grid for medium in encoded.media] == [media.grid for media in plan.media]
    assert len(patches_of(encoded, checkpoint)) == 4 * int(plan.tokens.vision_mask.sum())


def test_a_sample_may_take_every_position_of_the_model_and_no_more(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Positions are numbered from 0. A picture takes fewer of them than it has tokens."""
    Image.new("RGB", (320, 320)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]
    sample = Sample(Origin("d", "f", 1), {"image": "a.png", "conversations": turns}, str(tmp_path))
    checkpoint = tiny_checkpoint("qwen3_vl")
    config, processor = AutoConfig.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    encoder = build_encoder(processor, config, get_family("qwen3_vl"), DataArguments(dataset_use="d"), 4096)
    tokens = encoder.plan(sample).tokens
    taken = int(tokens.position_ids[1:].max()) + 1
    assert taken == len(tokens) - 10 * 10 + 10
    assert len(replace(encoder, max_positions=taken).plan(sample).tokens) == len(tokens)
    with pytest.raises(SampleError, match=f"takes {taken} positions, but the model is made for {taken - 1} ") as caught:
        replace(encoder, max_positions=taken - 1).plan(sample)
    assert caught.value.category == "beyond_context"
    assert str(caught.value.origin) in str(caught.value)
