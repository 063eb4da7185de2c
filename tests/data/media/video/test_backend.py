"""What all video backends share: headers that can be, times of frames, and what is said of an error."""

from __future__ import annotations

import pytest

from qwenvl.data.media.video.backend import VideoHeader, checked_header, decoding, make_header
from qwenvl.utils.errors import SampleError


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ((None, 2.0, 4, 6), "no frames"),
        ((0, 2.0, 4, 6), "no frames"),
        ((8, 2.0, 0, 6), "no frames"),
        ((8, 2.0, 4, None), "no frames"),
        ((8, None, 4, 6), "no frame rate (None)"),
        ((8, 0.0, 4, 6), "no frame rate (0.0)"),
        ((8, -1.0, 4, 6), "no frame rate (-1.0)"),
        ((8, float("inf"), 4, 6), "no frame rate (inf)"),
        ((8, 2.0, 20_000, 20_000), "a frame has 400000000 pixels"),
    ],
)
def test_headers_that_cannot_be(facts: tuple[int | None, float | None, int | None, int | None], said: str) -> None:
    with pytest.raises(SampleError) as caught:
        checked_header(*facts)
    assert said in caught.value.reason
    assert caught.value.category == ("decompression_bomb" if "pixels" in said else "unreadable_file")
    assert checked_header(8, 0.5, 4, 6) == VideoHeader(8, 0.5, 4, 6)


@pytest.mark.parametrize(
    ("times", "duration", "constant"),
    [
        ([0.0, 0.5, 1.0, 1.5], 2.0, True),
        ([0.0, 0.033, 0.067, 0.1], 0.133, True),  # rounded to milliseconds, as Matroska has them
        ([0.0, 0.5, 1.2, 1.5], 2.0, True),  # within half a frame
        ([0.0, 0.5, 1.3, 1.5], 2.0, False),
        ([0.0, 0.1, 0.2, 4.0], 8.0, False),
        ([0.0, 0.1, 0.2, 0.3], 8.0, False),  # the last frame stays long
    ],
)
def test_times_are_kept_where_the_rate_is_not_constant(times: list[float], duration: float, constant: bool) -> None:
    header = make_header(times, duration, 4, 6)
    assert header.fps == pytest.approx(4 / duration)
    assert header.times == (None if constant else tuple(times))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[12:00:01] /build/src/video.cc:151: Check failed: no stream\nStack trace:\n"),
            "Check failed: no stream",
        ),
        (ValueError(" bad data in /dev/fd/17 \n"), "bad data in the file"),
        (ValueError("bad data: '/dev/fd/17'"), "bad data: the file"),
        (RuntimeError("x" * 400), "x" * 300),
        (KeyError(), "KeyError"),
    ],
)
def test_of_an_error_of_a_decoder_one_line_is_said(error: Exception, said: str) -> None:
    with pytest.raises(SampleError) as caught, decoding("torchcodec"):
        raise error
    assert caught.value.reason == f"torchcodec cannot decode it: {said}"
    assert caught.value.category == "unreadable_file"
