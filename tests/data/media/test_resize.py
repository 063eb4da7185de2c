"""Sizes, frame sampling and grids against the processors of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from qwen_vl_utils.vision_process import calculate_video_frame_range
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as clip_smart_resize
from transformers.video_utils import VideoMetadata

from qwenvl.data.media.resize import VisionSettings, frame_range, plan_image, plan_video, sample_frames, smart_resize
from qwenvl.data.types import ImageItem, VideoItem
from qwenvl.families import get_family
from qwenvl.utils.errors import SampleError

SIDES = st.integers(1, 4000)


@dataclass(frozen=True)
class Facts:
    num_frames: int
    fps: float
    height: int = 240
    width: int = 320
    times: tuple[float, ...] | None = None


def settings_for(model_type: str, **changes: object) -> VisionSettings:
    settings = VisionSettings(
        family=get_family(model_type),
        patch_size=16 if "3" in model_type else 14,
        merge_size=2,
        temporal_patch_size=2,
        image_min_pixels=28 * 28 * 16,
        image_max_pixels=28 * 28 * 576,
        video_min_pixels=256 * 28 * 28,
        video_max_pixels=1024 * 28 * 28,
        video_min_frame_pixels=None,
        video_max_frame_pixels=None,
        video_fps=2.0,
        video_min_frames=4,
        video_max_frames=8,
    )
    return replace(settings, **changes)  # type: ignore[arg-type]


@given(SIDES, SIDES, st.sampled_from([28, 32]), st.integers(1, 10**6), st.integers(0, 10**7))
def test_fit_equals_smart_resize_of_images(height: int, width: int, factor: int, low: int, extra: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    expected = image_smart_resize(height, width, factor, low, low + extra)
    assert smart_resize(height, width, factor, low, low + extra) == expected


@given(SIDES, SIDES, st.integers(2, 64), st.integers(1, 10**6), st.integers(0, 10**8))
@example(height=64, width=64, frames=5, low=1, extra=4 * 64 * 64 - 1)  # 5 frames count as 4, and fit as they are
@example(height=64, width=64, frames=7, low=1, extra=7 * 64 * 64)  # 7 frames count as 8, and do not
@example(height=320, width=33, frames=5, low=4 * 320 * 32 + 1, extra=10**8)  # 4 are too few pixels, 5 would do
def test_video_size_equals_smart_resize_of_qwen3(height: int, width: int, frames: int, low: int, extra: int) -> None:
    settings = settings_for(
        "qwen3_vl", video_min_pixels=low, video_max_pixels=low + extra, video_min_frames=frames, video_max_frames=frames
    )
    try:
        plan = plan_video(VideoItem("x"), Facts(frames, 2.0, height, width), settings)
    except SampleError as error:
        assert error.category == "extreme_ratio"
        with pytest.raises(ValueError, match="aspect ratio"):
            clip_smart_resize(frames, height, width, 2, 32, low, low + extra)
        return
    assert plan.resized == clip_smart_resize(frames, height, width, 2, 32, low, low + extra)
    assert plan.grid == (math.ceil(frames / 2), plan.resized[0] // 16, plan.resized[1] // 16)


@given(
    st.integers(2, 5000),
    st.sampled_from([1.0, 5.0, 23.976, 25.0, 29.97, 30.0, 60.0]),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.integers(1, 10),
    st.integers(2, 768),
)
@example(total=140, fps=1.0, target=0.5, low=1, high=50)  # 45 x 2.8 is not below 126
def test_frames_are_those_of_the_stock_video_processors(
    total: int, fps: float, target: float, low: int, high: int
) -> None:
    assume(low <= high)
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    limits = {"video_fps": target, "video_min_frames": low, "video_max_frames": high}
    ours = sample_frames(VideoItem("x"), total, fps, settings_for("qwen3_vl", **limits))
    stock = Qwen3VLVideoProcessor(min_frames=low, max_frames=high).sample_frames(metadata, fps=target)
    assert ours.tolist() == np.asarray(stock).tolist()
    if min(max(total / fps * target, low), high) < 2:
        return  # the stock processor of Qwen2-VL returns no frame at all; ours takes a pair
    ours = sample_frames(VideoItem("x"), total, fps, settings_for("qwen2_vl", **limits))
    stock = Qwen2VLVideoProcessor().sample_frames(metadata, fps=target, min_frames=low, max_frames=high)
    # By rounding, the stock processor sometimes asks for one frame more, which lies past the end of the video.
    assert ours.tolist() == [index for index in np.asarray(stock).tolist() if index < total][: len(ours)]
    assert len(ours) % 2 == 0


@given(st.integers(2, 3000), st.sampled_from([5.0, 24.0, 29.97]), st.floats(0, 60), st.floats(0, 60))
def test_frame_range_equals_qwen_vl_utils(total: int, fps: float, start: float, end: float) -> None:
    item = VideoItem("x", video_start=start, video_end=end)
    try:
        expected = calculate_video_frame_range({"video_start": start, "video_end": end}, total, fps)[:2]
    except ValueError:
        with pytest.raises(SampleError):
            frame_range(item, Facts(total, fps))
        return
    assert frame_range(item, Facts(total, fps)) == expected


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
@given(st.integers(30, 2000), st.integers(30, 2000), st.integers(2, 300))
@example(height=112, width=1264, frames=63)  # five frames are sampled
def test_a_clip_never_exceeds_its_budget(model_type: str, height: int, width: int, frames: int) -> None:
    settings = settings_for(model_type)
    plan = plan_video(VideoItem("x"), Facts(frames, 25.0, height, width), settings)
    frames = len(plan.indices)
    smallest = settings.factor**2 * frames
    # The stock processor of the "frames" layout, whose sizes ours equal, counts frames in pairs, and 5 as two pairs.
    counted = min(frames, round(frames / 2) * 2)
    assert counted * plan.resized[0] * plan.resized[1] <= max(settings.video_max_pixels, smallest)


def test_clip_budget_of_the_stock_processor_with_the_saved_limits_is_the_same() -> None:
    """The rule that the saved processor applies at inference (``cap_pixels_per_frame``) shares a clip the same way."""
    from qwenvl.data.encoding.processor import _video_limits

    settings = settings_for("qwen2_5_vl")
    low, high, tokens = _video_limits(settings)
    assert tokens is not None
    for frames in range(2, 9):
        total = int(tokens * settings.factor * settings.factor * 0.9)
        expected = image_smart_resize(480, 640, 28, low, max(min(high, total * 2 // frames), int(low * 1.05)))
        facts = Facts(frames, 2.0, 480, 640)
        item = VideoItem("x", nframes=frames - frames % 2)
        if frames % 2 == 0:
            assert plan_video(item, facts, settings).resized == expected


def test_extreme_ratio_is_a_sample_error() -> None:
    with pytest.raises(SampleError, match="one side is more than 200 times") as caught:
        plan_image(ImageItem("x"), (10, 3000), settings_for("qwen3_vl"))
    assert caught.value.category == "extreme_ratio"


@pytest.mark.parametrize("size", [(10, 2000), (2000, 10)])
def test_the_most_extreme_ratio_is_taken_as_the_stock_processor_takes_it(size: tuple[int, int]) -> None:
    settings = settings_for("qwen3_vl")
    expected = image_smart_resize(*size, 32, settings.image_min_pixels, settings.image_max_pixels)
    assert plan_image(ImageItem("x"), size, settings).resized == expected
    longer = (size[0] + (size[0] > 10), size[1] + (size[1] > 10))
    with pytest.raises(SampleError, match=r"2001 .*one side is more than 200 times|x 2001 .*more than 200 times"):
        plan_image(ImageItem("x"), longer, settings)


def test_one_frame_is_a_sample_error() -> None:
    with pytest.raises(SampleError, match="1 frame"):
        plan_video(VideoItem("x"), Facts(1, 25.0), settings_for("qwen3_vl"))


def test_item_limits_override_those_of_the_run() -> None:
    settings = settings_for("qwen3_vl")
    assert plan_image(ImageItem("x", max_pixels=32 * 32 * 4), (640, 640), settings).grid == (1, 4, 4)
    plan = plan_video(VideoItem("x", nframes=2, max_pixels=64 * 64, min_pixels=1), Facts(100, 25.0), settings)
    assert len(plan.indices) == 2
    assert plan.resized[0] * plan.resized[1] <= 64 * 64
    with pytest.raises(SampleError, match="min_pixels"):
        plan_image(ImageItem("x", min_pixels=10**6, max_pixels=10**5), (640, 640), settings)


def test_where_the_stock_processor_asks_for_a_frame_past_the_end_the_others_are_used() -> None:
    """float32 rounds 191 / 60 down, so that its steps reach 191. It fails there; nobody serves an odd number."""
    metadata, limits = VideoMetadata(total_num_frames=191, fps=25), {"min_frames": 2, "max_frames": 768}
    stock = Qwen2VLVideoProcessor().sample_frames(metadata, fps=8, **limits).tolist()
    assert len(stock) == 61 and stock[-1] == 191
    with pytest.raises(IndexError):
        Qwen2VLVideoProcessor()(
            videos=[np.zeros((191, 3, 56, 56), np.uint8)],
            video_metadata=[metadata],
            fps=8,
            **limits,
            do_sample_frames=True,
        )
    settings = settings_for("qwen2_vl", video_fps=8, video_min_frames=2, video_max_frames=768)
    assert sample_frames(VideoItem("x"), 191, 25, settings).tolist() == stock[:60]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_seconds_of_a_patch_are_those_of_its_frames_in_the_source(model_type: str) -> None:
    """Sixteen frames at 4 a second, from the second one on: every fourth is taken, so one a second."""
    settings = settings_for(model_type, video_fps=1.0, video_min_frames=2)
    item = VideoItem("x", video_start=1.0)
    plan = plan_video(item, Facts(20, 4.0), settings)
    indices = {"qwen2_vl": [4, 8, 12, 16], "qwen3_vl": [4, 9, 14, 19]}[model_type]
    assert plan.indices.tolist() == indices
    assert plan.timestamps == ((indices[0] + indices[1]) / 8, (indices[2] + indices[3]) / 8)
    assert plan.sampled_fps == 1.0


def test_frames_given_as_pictures_are_used_as_they_are() -> None:
    settings = settings_for("qwen3_vl")
    item = VideoItem(("a", "b", "c"), fps=1.0)
    plan = plan_video(item, Facts(3, 1.0), settings)
    assert plan.indices.tolist() == [0, 1, 2]
    assert plan.timestamps == (0.5, 2.0)  # (0 + 1) / 2, and the last frame repeated: (2 + 2) / 2
    assert len(plan_video(item, Facts(30, 1.0), settings).indices) == 8


UNEVEN = Facts(24, 2.0, times=(*(number / 10 for number in range(20)), 5.9, 9.9, 13.9, 17.9))


@pytest.mark.parametrize(
    ("start", "end", "frames"),
    [
        (None, None, (0, 23)),
        (12, 18, (22, 23)),
        (9.9, 13.9, (21, 22)),
        (1.85, None, (19, 23)),
        (None, 0.5, (0, 5)),
        (0, 99, (0, 23)),
    ],
)
def test_a_range_counts_in_the_real_times_of_frames(
    start: float | None, end: float | None, frames: tuple[int, int]
) -> None:
    assert frame_range(VideoItem("a", video_start=start, video_end=end), UNEVEN) == frames


@pytest.mark.parametrize(("start", "end"), [(2, 5), (10, 13.8), (14, 99), (18, None)])
def test_a_range_between_frames_is_refused(start: float, end: float | None) -> None:
    with pytest.raises(SampleError, match="leave no frames"):
        frame_range(VideoItem("a", video_start=start, video_end=end), UNEVEN)


def test_timestamps_are_the_real_times_of_frames() -> None:
    plan = plan_video(VideoItem("a", nframes=8), UNEVEN, settings_for("qwen3_vl"))
    assert plan.indices.tolist() == [0, 3, 7, 10, 13, 16, 20, 23]
    assert plan.seconds.tolist() == pytest.approx([0, 0.3, 0.7, 1.0, 1.3, 1.6, 5.9, 17.9])
    assert plan.timestamps == pytest.approx((0.15, 0.85, 1.45, 11.9))
    assert plan.fps == 2.0  # which frames are taken is the processor's rule


def test_a_range_of_uneven_frames_has_their_own_rate() -> None:
    """As a file of these frames alone would have: 5 frames, 4 seconds apart, are sampled as 20 seconds."""
    facts = Facts(7, 3.0, times=(0.0, 0.1, 4.1, 8.1, 12.1, 16.1, 16.2))
    plan = plan_video(VideoItem("a", fps=1, video_start=0.05, video_end=16.15), facts, settings_for("qwen2_5_vl"))
    assert plan.fps == pytest.approx(0.25)
    assert plan.indices.tolist() == [1, 2, 3, 4]  # an even number of them
    assert plan.times is not None and plan.times.tolist() == [0.1, 4.1, 8.1, 12.1]
    assert plan.sampled_fps == pytest.approx(4 / 5 * 0.25)
    assert plan_video(VideoItem("a"), replace(facts, times=(0.0,) * 7), settings_for("qwen3_vl")).fps == 3.0
