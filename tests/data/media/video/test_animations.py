"""Animated GIF and WebP files as videos: their frames, how long each is shown, and transparency on white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvl.data.media.video.animations import AnimationBackend, is_animation
from qwenvl.data.media.video.backend import VideoHeader
from tests.data.images import encoded, reason_of


def animation(kind: str, milliseconds: list[int] | int, mode: str = "RGB") -> bytes:
    colours = [(0, 0, 0), (90, 0, 0), (180, 0, 0), (255, 255, 0)]
    frames = [Image.new("RGB", (40, 20), colour).convert(mode) for colour in colours]
    for frame in frames:
        if mode == "RGBA":
            frame.paste((0, 0, 0, 0), (0, 0, 20, 10))
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=milliseconds, lossless=True)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_frames_of_a_constant_rate(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(animation(kind, 200))
    for source in (str(tmp_path / "a"), animation(kind, 200)):
        assert AnimationBackend().header(source) == VideoHeader(4, pytest.approx(5.0), 20, 40)
        frames = AnimationBackend().frames(source, np.array([3, 0, 2, 2]))
        assert frames.dtype == torch.uint8 and frames.shape == (4, 3, 20, 40)
        expected = [[255, 255, 0], [0, 0, 0], [180, 0, 0], [180, 0, 0]]
        assert (frames[:, :, 10, 20] - torch.tensor(expected)).abs().max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_frames_are_shown_as_long_as_they_say(kind: str) -> None:
    header = AnimationBackend().header(animation(kind, [100, 1000, 100, 800]))
    assert header.times == pytest.approx((0.0, 0.1, 1.1, 1.2))
    assert header.fps == pytest.approx(4 / 2.0)


def test_a_frame_of_no_time_is_shown_as_by_browsers() -> None:
    assert AnimationBackend().header(animation("GIF", 0)).fps == pytest.approx(10.0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_transparency_is_white(kind: str) -> None:
    frames = AnimationBackend().frames(animation(kind, 100, "RGBA"), np.arange(4))
    assert frames[:, :, 5, 5].tolist() == [[255, 255, 255]] * 4
    assert frames[1, :, 15, 5].tolist() == [90, 0, 0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_still_image_has_one_frame_and_a_cut_file_is_named(kind: str) -> None:
    assert AnimationBackend().header(encoded(Image.new("RGB", (40, 20)), kind)).num_frames == 1
    whole = animation(kind, 100)
    category = "truncated" if kind == "GIF" else "unreadable_file"
    reason_of(lambda: AnimationBackend().frames(whole[: len(whole) * 2 // 3], np.arange(4)), category)


def test_what_an_animation_is() -> None:
    assert is_animation(animation("GIF", 100)) and is_animation(animation("WEBP", 100))
    assert not is_animation(b"RIFF\0\0\0\0AVI ") and not is_animation(b"\0\0\0\x18ftypisom")
