"""Command lines of servers. tests/clients starts vLLM with them."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.serving.commands import Adapter, Served, notes, vllm_command


def served(frame: int, **given: Any) -> Served:
    """Return adapters on Qwen2.5-VL whose clips share 32,768 pixels among 8 frames of at most ``frame`` each."""
    limits = {
        "image_processor": {"size": {"shortest_edge": 1024, "longest_edge": 4096}},
        "video_processor": {
            "size": {"shortest_edge": 1024, "longest_edge": frame},
            "fps": 2.0,
            "min_frames": 4,
            "max_frames": 8,
            "cap_pixels_per_frame": True,
            "max_video_tokens": (32768 // 2 + 0.5) / (0.9 * 28**2),
            **given,
        },
    }
    return Served("out", limits, False, True, 512, {"image": 1, "video": 1}, Adapter("base", 8))


@pytest.mark.parametrize(("frame", "shared"), [(4096, False), (4097, True), (16384, True)])
def test_a_budget_that_vllm_cannot_be_told_is_noted(frame: int, shared: bool) -> None:
    assert any("pixels that the frames of a clip share" in note for note in notes(served(frame))) == shared
    assert "max_video_tokens" not in vllm_command(served(frame))  # without effect: the processor's own counts


@pytest.mark.parametrize(("given", "noted"), [({}, False), ({"max_frames": 900}, True), ({"fps": 60.0}, True)])
def test_limits_beyond_those_of_vllm_are_noted(given: dict[str, Any], noted: bool) -> None:
    assert (
        any("at most 768 frames of a video, at most 30 per second" in note for note in notes(served(64, **given)))
        == noted
    )
