"""Pixels and limits against the checkpoints' own processors in transformers; template arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor
from transformers.video_utils import VideoMetadata

from qwenvl.config import DataArguments
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import (
    build_encoder,
    describe_limits,
    open_processor,
    processor_limits,
    with_training_limits,
)
from qwenvl.data.media.video.decode import choose_backend
from qwenvl.data.types import Sample
from qwenvl.families import FAMILIES, get_family
from qwenvl.utils.errors import Origin, UserError
from tests.data.media.video.test_decode import make_video
from tests.patches import grids_of, patches_of

LIMITS: dict[str, Any] = {
    "min_pixels": 40 * 40,
    "max_pixels": 100 * 100,
    "video_min_pixels": 4 * 60 * 60,
    "video_max_pixels": 8 * 70 * 70,
    "video_max_frames": 8,
    "video_min_frames": 4,
}


def build(folder: Path, family: str, **changes: Any) -> tuple[Any, SampleEncoder]:
    processor = open_processor(str(folder))
    arguments = DataArguments(**{**LIMITS, **changes})
    config = AutoConfig.from_pretrained(folder)
    return processor, build_encoder(processor, config, get_family(family), arguments, 10_000)


def ask(data_path: Path, *parts: dict[str, Any], **fields: Any) -> Sample:
    turns = [{"role": "user", "content": [*parts]}, {"role": "assistant", "content": "It."}]
    return Sample(Origin("set", "set.json", 1), {"messages": turns, **fields}, str(data_path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(200, 90), (30, 25), (70, 300)])
@pytest.mark.parametrize("own", [{}, {"max_pixels": 60 * 60}, {"min_pixels": 150 * 150}])
def test_pictures_equal_the_stock_processors(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], family: str, size: tuple[int, int], own: dict[str, int]
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    processor, encoder = build(tiny_checkpoint(family), family)
    sample = ask(tmp_path, {"type": "image", "image": "a.png", **own})
    encoded = encoder.encode([encoder.plans(sample)[0]], sample)[0]
    low, high = own.get("min_pixels", LIMITS["min_pixels"]), own.get("max_pixels", LIMITS["max_pixels"])
    limits = {"shortest_edge": low, "longest_edge": max(low, high)}
    stock = processor.image_processor(images=[picture], size=limits, return_tensors="pt")
    assert grids_of(encoded) == stock["image_grid_thw"].tolist()
    assert torch.equal(patches_of(encoded, tiny_checkpoint(family)), stock["pixel_values"])


def test_processors_that_resize_differently_are_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3_vl")
    processor: Any = open_processor(str(folder))
    processor.video_processor.resample = 2
    config, arguments = AutoConfig.from_pretrained(folder), DataArguments()
    with pytest.raises(UserError, match="video_processor resizes with resample 2"):
        build_encoder(processor, config, get_family("qwen3_vl"), arguments, 100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "fps"), [(24, 8), (20, 4), (5, 2)])
def test_videos_equal_the_stock_processors_with_the_saved_limits(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], family: str, frames: int, fps: int
) -> None:
    """The saved processor samples and resizes a whole video at inference as training did."""
    path = make_video(tmp_path / "a.mp4", frames=frames, fps=fps)
    processor, encoder = build(tiny_checkpoint(family), family)
    with_training_limits(processor, encoder.settings).save_pretrained(tmp_path / "saved")
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    sample = ask(tmp_path, {"type": "video", "video": "a.mp4"})
    plan = encoder.plans(sample)[0]
    encoded = encoder.encode([plan], sample)[0]
    whole = choose_backend().frames(str(path), np.arange(frames))
    metadata = VideoMetadata(total_num_frames=frames, fps=fps, duration=frames / fps, video_backend="torchcodec")
    asked: dict[str, Any] = {"video_metadata": [metadata], "do_sample_frames": True}
    stock = saved.video_processor(videos=[whole], return_tensors="pt", **asked)
    assert grids_of(encoded) == stock["video_grid_thw"].tolist()
    assert torch.equal(patches_of(encoded, tiny_checkpoint(family)), stock["pixel_values_videos"])
    text = encoder.template.render(plan.conversation).text
    if encoder.settings.family.video_layout == "frames":
        # The stock processor writes brackets around every frame. Until transformers 5.6 it replaced the ones that the
        # template has around the placeholder, as the official recipe was trained; since 5.10 it leaves them besides.
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    theirs = saved(text=[text], videos=[whole], return_tensors="pt", **asked)
    assert plan.tokens.input_ids.tolist() == theirs["input_ids"][0].tolist()  # timestamps included


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_limits_are_saved_beside_the_original_ones(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], family: str
) -> None:
    processor, encoder = build(tiny_checkpoint(family), family)
    before = json.dumps(processor_limits(processor))
    limited = with_training_limits(processor, encoder.settings)
    assert json.dumps(processor_limits(processor)) == before
    limited.save_pretrained(tmp_path)
    limits = processor_limits(AutoProcessor.from_pretrained(tmp_path))
    assert limits["image_processor"]["size"] == {"shortest_edge": 1600, "longest_edge": 10000}
    assert limits["video_processor"]["max_frames"] == 8
    assert limits["video_processor"]["do_sample_frames"] is (family != "qwen2_vl")  # as published
    assert json.loads(before)["image_processor"]["size"]["longest_edge"] > 10**6


def test_limits_in_force_in_words(tiny_checkpoint: Callable[..., Path]) -> None:
    _, encoder = build(tiny_checkpoint("qwen3_vl"), "qwen3_vl")
    assert describe_limits(encoder.settings) == {
        "images": "1,600 to 10,000 pixels (1 to 9 tokens)",
        "videos": "14,400 to 39,200 pixels per clip, 4 to 8 frames at 2 per second",
    }


@pytest.mark.parametrize("arguments", [{"add_vision_id": True}, {"chat_template_kwargs": {"add_vision_id": True}}])
def test_template_arguments_reach_the_text(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    processor, encoder = build(tiny_checkpoint("qwen3_vl"), "qwen3_vl", **arguments)
    part = {"type": "image", "image": "a.png"}
    plan = encoder.plans(ask(tmp_path, part, {"type": "text", "text": "Same as "}, part))[0]
    text = processor.tokenizer.decode(plan.tokens.input_ids)
    assert "Picture 1: " in text
    assert "Same as Picture 2: " in text
    assert len(plan.tokens) == len(plan.tokens.labels) == plan.tokens.position_ids.shape[1]
    _, plain = build(tiny_checkpoint("qwen3_vl"), "qwen3_vl")
    assert len(plain.plans(ask(tmp_path, part, {"type": "text", "text": "Same as "}, part))[0].tokens) < len(
        plan.tokens
    )
