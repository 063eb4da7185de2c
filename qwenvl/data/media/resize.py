"""Plan sizes without pixels: resize rules, frame sampling and patch grids, from headers alone.

The rules are those of the checkpoints' own processors in transformers (``smart_resize`` and ``sample_frames`` of
``Qwen2VLImageProcessor``, ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor``), which the tests use as oracles.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwenvl.data.types import ImageItem, VideoItem
from qwenvl.families import Family
from qwenvl.utils.errors import SampleError

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class VisionSettings:
    """The limits in force for one run. Pixels count height x width; of a clip, frames x height x width.

    Args:
        family: Model family, which has the layout of videos.
        patch_size: Side of a patch, in pixels.
        merge_size: Side of a token, in patches.
        temporal_patch_size: Frames per patch.
        image_min_pixels: Lower limit of an image.
        image_max_pixels: Upper limit of an image.
        video_min_pixels: Lower limit of a clip.
        video_max_pixels: Upper limit of a clip.
        video_min_frame_pixels: Lower limit of a frame; None for no such limit.
        video_max_frame_pixels: Upper limit of a frame; None for no such limit.
        video_fps: Frames per second to sample.
        video_min_frames: Fewest frames of a clip.
        video_max_frames: Most frames of a clip.
        tokens_per_frame: Tokens of an image, and of each temporal patch of a video, whatever its size; None for one
            token per merged patch.
    """

    family: Family
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_min_pixels: int
    image_max_pixels: int
    video_min_pixels: int
    video_max_pixels: int
    video_min_frame_pixels: int | None
    video_max_frame_pixels: int | None
    video_fps: float
    video_min_frames: int
    video_max_frames: int
    tokens_per_frame: int | None = None

    @property
    def factor(self) -> int:
        """Side of a token in pixels: resized heights and widths are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def frame_min_pixels(self) -> int:
        """Lower limit of one frame in families whose processors limit frames (``clip`` layout)."""
        if self.video_min_frame_pixels is not None:
            return self.video_min_frame_pixels
        return max(1, self.video_min_pixels // self.video_max_frames)


class VideoFacts(Protocol):
    """Facts about a video that its container holds, without decoding."""

    @property
    def num_frames(self) -> int:
        """Number of frames."""

    @property
    def fps(self) -> float:
        """Average frames per second."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def width(self) -> int:
        """Pixels."""

    @property
    def times(self) -> tuple[float, ...] | None:
        """Seconds of every frame, ascending; None where frame ``n`` is shown at ``n / fps``."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """Plan of an image: its size after resizing, and its patches.

    Args:
        item: Image as written in the record.
        resized: (height, width) in pixels after resizing.
        grid: (1, height, width) in patches.
        size: (height, width) in pixels before resizing, as the image is shown.
    """

    item: ImageItem
    resized: tuple[int, int]
    grid: tuple[int, int, int]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """Plan of a video: its sampled frames, their size after resizing, and their patches.

    Args:
        item: Video as written in the record.
        num_frames: Frames of the source, within ``video_start`` and ``video_end``.
        fps: Frames per second of the source, on average within ``video_start`` and ``video_end``.
        indices: int64 [n], source index of every sampled frame.
        resized: (height, width) of a frame in pixels after resizing.
        grid: (temporal, height, width) in patches.
        timestamps: Seconds in the source of every temporal patch: the mean of its first and last frame.
        times: float64 [n], seconds of every sampled frame, if the source has no constant rate; None if it has.
    """

    item: VideoItem
    num_frames: int
    fps: float
    indices: np.ndarray
    resized: tuple[int, int]
    grid: tuple[int, int, int]
    timestamps: tuple[float, ...]
    times: np.ndarray | None = None

    @property
    def seconds(self) -> np.ndarray:
        """Seconds in the source of every sampled frame, float64 [n]."""
        return self.indices / self.fps if self.times is None else self.times

    @property
    def sampled_fps(self) -> float:
        """Frames per second after sampling."""
        return len(self.indices) / self.num_frames * self.fps


MediaPlan = ImagePlan | VideoPlan


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, frames: int = 1
) -> tuple[int, int]:
    """Return the (height, width) nearest in aspect ratio that are multiples of ``factor`` and within the limits.

    ``frames`` x height x width lies between the limits, as far as whole multiples of ``factor`` allow.
    Worked example: 480 x 640 with factor 32 and at most 100,000 pixels becomes 256 x 352.

    Raises:
        SampleError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise SampleError(
            "extreme_ratio",
            f"the image is {width} x {height} pixels (width x height): one side is more than {MAX_ASPECT_RATIO} "
            "times the other, which these models refuse. Crop it or remove the sample.",
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    even_frames = frames if frames == 1 else round(frames / 2) * 2
    if even_frames * rows * columns > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif even_frames * rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def plan_image(item: ImageItem, size: tuple[int, int], settings: VisionSettings) -> ImagePlan:
    """Return the plan of an image of ``size`` (height, width) pixels.

    Raises:
        SampleError: extreme aspect ratio, or limits of its own that contradict each other.
    """
    low, high = _image_limits(item, settings)
    resized = smart_resize(*size, settings.factor, low, high)
    grid = (1, resized[0] // settings.patch_size, resized[1] // settings.patch_size)
    return ImagePlan(item, resized, grid, size)


def plan_video(item: VideoItem, facts: VideoFacts, settings: VisionSettings) -> VideoPlan:
    """Return the plan of a video from the ``facts`` of its container.

    Raises:
        SampleError: too few frames, a time range that holds none, extreme aspect ratio, contradicting limits.
    """
    first, last = frame_range(item, facts)
    available = last - first + 1
    if available < settings.temporal_patch_size:
        raise SampleError(
            "one_frame",
            f"the video has {available} frame(s) in the range used, and at least {settings.temporal_patch_size} are "
            "needed. Give a still image as `image`, or remove the sample.",
        )
    fps = _mean_rate(facts, first, last)
    indices = first + sample_frames(item, available, fps, settings)
    resized = _frame_size(item, len(indices), facts, settings)
    temporal = math.ceil(len(indices) / settings.temporal_patch_size)
    grid = (temporal, resized[0] // settings.patch_size, resized[1] // settings.patch_size)
    times = None if facts.times is None else np.asarray(facts.times)[indices]
    timestamps = _timestamps(indices / fps if times is None else times, settings.temporal_patch_size)
    return VideoPlan(item, available, fps, indices, resized, grid, timestamps, times)


def frame_range(item: VideoItem, facts: VideoFacts) -> tuple[int, int]:
    """Return the first and last source frame between ``video_start`` and ``video_end``, both included.

    For videos of constant rate, the rule is that of ``calculate_video_frame_range`` of qwen-vl-utils; for other videos,
    the frames are those with times in the range.

    Raises:
        SampleError: no frame lies in the range.
    """
    duration = facts.num_frames / facts.fps
    start, end = item.video_start, item.video_end
    first, last = 0, facts.num_frames - 1
    if start is not None:
        first = math.ceil(min(max(start, 0.0), duration) * facts.fps)
    if end is not None:
        last = min(math.floor(min(max(end, 0.0), duration) * facts.fps), last)
    if facts.times is not None:
        first = 0 if start is None else bisect.bisect_left(facts.times, start)
        last = facts.num_frames - 1 if end is None else bisect.bisect_right(facts.times, end) - 1
    if first > last or (first == last and (start is not None or end is not None)):
        raise SampleError(
            "empty_range",
            f"video_start={start} and video_end={end} leave no frames of a video of "
            f"{duration:.2f} s ({facts.num_frames} frames at {facts.fps:.3f} fps). Change them or remove them.",
        )
    return first, last


def _mean_rate(facts: VideoFacts, first: int, last: int) -> float:
    """Return the frames per second between two frames of a video, as of a file with these frames alone."""
    if facts.times is None or last - first + 1 == facts.num_frames:
        return facts.fps
    seconds = facts.times[last] - facts.times[first]
    return (last - first) / seconds if seconds > 0 else facts.fps


def sample_frames(item: VideoItem, available: int, fps: float, settings: VisionSettings) -> np.ndarray:
    """Return which of ``available`` frames are used: int64 [n], ascending, as the family's processor samples them.

    Frames given as images are used as they are, up to ``max_frames`` evenly spread ones.

    Raises:
        SampleError: ``nframes`` asks for more frames than there are.
    """
    step = settings.temporal_patch_size
    low = settings.video_min_frames if item.min_frames is None else item.min_frames
    high = settings.video_max_frames if item.max_frames is None else item.max_frames
    if item.nframes is not None and item.nframes > available:
        raise SampleError(
            "too_few_frames", f"nframes={item.nframes}, but the video has {available} frames in the range."
        )
    if isinstance(item.source, tuple):
        return _spread(available, min(available, item.nframes or high))
    target_fps = settings.video_fps if item.fps is None else item.fps
    if settings.family.video_layout == "frames":
        count = item.nframes or min(max(int(available / fps * target_fps), low), high, available)
        return _spread(available, count)
    if item.nframes is not None:
        count = round(item.nframes / step) * step
    else:
        high = math.floor(min(high, available) / step) * step
        count = math.floor(min(max(available / fps * target_fps, low), high, available) / step) * step
    count = max(step, count)
    # Whole numbers: in float64, 45 x (140 / 50) is just below 126. The processors' float32 rounds such products back.
    return np.arange(count, dtype=np.int64) * available // count


def _spread(available: int, count: int) -> np.ndarray:
    """Return ``count`` indices spread evenly from the first to the last of ``available`` frames."""
    return np.linspace(0, available - 1, count).round().astype(np.int64)


def _frame_size(item: VideoItem, frames: int, facts: VideoFacts, settings: VisionSettings) -> tuple[int, int]:
    """Return the (height, width) a frame is resized to, by the rule of the family's own video processor."""
    factor = settings.factor
    clip_max = settings.video_max_pixels if item.total_pixels is None else item.total_pixels
    frame_max = settings.video_max_frame_pixels if item.max_pixels is None else item.max_pixels
    if settings.family.video_layout == "frames":
        clip_min = settings.video_min_pixels
        frame_min = settings.video_min_frame_pixels if item.min_pixels is None else item.min_pixels
        clip_max = clip_max if frame_max is None else min(clip_max, frame_max * frames)
        clip_min = min(clip_max, clip_min if frame_min is None else frame_min * frames)
        height, width = facts.height, facts.width
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        return smart_resize(height, width, factor, clip_min, clip_max, frames)
    # The processor of these families limits frames. Every pair of frames shares a patch: hence its // 2 * 2.
    share = clip_max // 2 * 2 // frames
    upper = share if frame_max is None else min(frame_max, share)
    lower = min(upper, settings.frame_min_pixels if item.min_pixels is None else item.min_pixels)
    return smart_resize(facts.height, facts.width, factor, lower, upper)


def _timestamps(seconds: np.ndarray, step: int) -> tuple[float, ...]:
    """Return the seconds of every temporal patch; the last frame is repeated to fill its patch."""
    padded = np.concatenate([seconds, np.repeat(seconds[-1:], -len(seconds) % step)]).reshape(-1, step)
    return tuple(((padded[:, 0] + padded[:, -1]) / 2).tolist())


def _image_limits(item: ImageItem, settings: VisionSettings) -> tuple[int, int]:
    """Return the limits of an image. Its own limit overrides the opposite limit of the run."""
    if item.min_pixels is not None and item.max_pixels is not None and item.min_pixels > item.max_pixels:
        raise SampleError(
            "bad_limits", f"min_pixels={item.min_pixels} of the image is more than its max_pixels={item.max_pixels}."
        )
    if item.max_pixels is not None:
        return min(item.min_pixels or settings.image_min_pixels, item.max_pixels), item.max_pixels
    if item.min_pixels is not None:
        return item.min_pixels, max(item.min_pixels, settings.image_max_pixels)
    return settings.image_min_pixels, settings.image_max_pixels
