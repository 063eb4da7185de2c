"""Read videos with PyAV: the headers of all videos, and frames where torchcodec returns none.

PyAV carries an FFmpeg of its own that reads nearly everything (AV1, MPEG-TS, rotated videos), on every platform.
Headers come from the packets, which hold the number of frames and their times; only the first frame is decoded, for its
size as shown. So the header of a video does not depend on the backend that decodes it.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from qwenvl.data.media.video.backend import (
    Shrink,
    VideoHeader,
    as_they_are,
    checked_header,
    decoding,
    in_pieces,
    make_header,
)
from qwenvl.data.media.video.files import opened_video
from qwenvl.utils.errors import SampleError

_CUT = "It may be cut off, as a download or recording that was not finished is."
_CURE = "Encode it anew ('ffmpeg -i in.mp4 -c:v libx264 out.mp4')"


@dataclass(frozen=True, slots=True)
class _Packets:
    """The frames of a video, from its packets.

    Args:
        pts: Times of the frames in units of the stream, ascending.
        keys: Times of the key frames, which can be decoded without others.
        end: Time at which the last frame ends.
        height: Height in pixels, as the video is shown.
        width: Width in pixels, as the video is shown.
    """

    pts: list[int]
    keys: list[int]
    end: float
    height: int
    width: int


class PyAvBackend:
    """Decodes with PyAV.

    Raises:
        ImportError: PyAV is not installed.
    """

    name = "PyAV"

    def __init__(self) -> None:
        import av  # noqa: F401

    def header(self, source: str | bytes) -> VideoHeader:
        """See :class:`~qwenvl.data.media.video.backend.VideoBackend`."""
        return read_header(source)

    def frames(self, source: str | bytes, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """See :class:`~qwenvl.data.media.video.backend.VideoBackend`."""
        with opened_video(source) as path:
            with _opened(path) as (container, stream):
                packets = _packets(container, stream)
            with _FrameReader(path, packets) as reader:
                return in_pieces(indices, packets.height, packets.width, reader.read, shrink)


def read_header(source: str | bytes) -> VideoHeader:
    """Return the header of a video, from its packets and first frame.

    Raises:
        SampleError: see :class:`~qwenvl.data.media.video.backend.VideoBackend`.
    """
    with opened_video(source) as path, _opened(path) as (container, stream):
        packets = _packets(container, stream)
        unit, first = Fraction(stream.time_base), packets.pts[0]
    # Counted from the first frame, as in players: some files do not start at time 0.
    times = [float((pts - first) * unit) for pts in packets.pts]
    return make_header(times, float((packets.end - first) * unit), packets.height, packets.width)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """Open a video and its first stream of frames.

    Raises:
        SampleError: there is none, or it cannot be decoded; the message then names its codec.
    """
    import av  # only here: it is slow to import, and images do not need it

    with decoding("PyAV", cure=f". {_CUT}"):
        container = av.open(path, metadata_errors="replace")
    with container:
        if not container.streams.video:
            kinds = sorted({stream.type for stream in container.streams})
            has = f"only {', '.join(kinds)}." if kinds else f"nor anything else. {_CUT}"
            raise SampleError("unreadable_file", f"the file has no video, {has}")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise SampleError("unreadable_file", f"PyAV has no decoder for its codec. {_CURE}.")
        stream.codec_context.thread_count = 1
        with decoding(f"PyAV (codec {stream.codec_context.name})", cure=f". {_CURE}, or leave the sample out."):
            yield container, stream


def _packets(container: Any, stream: Any) -> _Packets:
    """Read the packets of a stream, except packets that an edit list keeps only to decode others."""
    found, shown = [], None
    for packet in container.demux(stream):
        if shown is None:
            shown = next(iter(packet.decode()), None)
        if packet.size and not packet.is_discard:
            pts = packet.dts if packet.pts is None else packet.pts
            found.append((pts, packet.is_keyframe, packet.duration or 0))
    if not found or shown is None:
        raise SampleError("unreadable_file", "the video has no frames.")
    if any(pts is None for pts, _, _ in found):
        raise SampleError("unreadable_file", f"the video does not say the times of its frames. {_CURE}.")
    found.sort()
    pts = [one for one, _, _ in found]
    # Some containers lack the duration of the last frame: then it is the mean of the others.
    last = found[-1][2] or ((pts[-1] - pts[0]) / (len(pts) - 1) if len(pts) > 1 else 1)
    sizes = (shown.height, shown.width)
    height, width = sizes[::-1] if round(shown.rotation / 90) % 2 else sizes
    checked_header(len(found), 1.0, height, width)
    return _Packets(pts, [one for one, is_key, _ in found if is_key], pts[-1] + last, height, width)


class _FrameReader:
    """Context manager that decodes single frames of a video, forward where it can.

    Args:
        path: Path of the file.
        packets: Packets of the file.
    """

    def __init__(self, path: str, packets: _Packets) -> None:
        self._path = path
        self._packets = packets
        self._open = contextlib.ExitStack()
        self._frames: Iterator[Any] = iter(())
        self._place: int | None = None  # pts of the last decoded frame

    def __enter__(self) -> _FrameReader:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)

    def read(self, indices: list[int]) -> torch.Tensor:
        """Decode frames to uint8 [n, 3, height, width], rotated as the file says."""
        found = {index: self._decode(self._packets.pts[index]) for index in sorted(set(indices))}
        return torch.stack([found[index] for index in indices]).permute(0, 3, 1, 2)

    def _decode(self, pts: int) -> torch.Tensor:
        keys = self._packets.keys
        key = keys[max(0, bisect.bisect_right(keys, pts) - 1)] if keys else pts
        if self._place is None or not key <= self._place < pts:
            self._restart(key)
        frame = self._forward(pts)
        if frame is None:  # some containers seek by estimates, and may end up after the frame
            self._restart(None)
            frame = self._forward(pts)
        if frame is None:
            raise SampleError("unreadable_file", f"PyAV cannot decode it: a frame is missing. {_CURE}.")
        return _upright(frame)

    def _restart(self, pts: int | None) -> None:
        """Seek to a key frame; None reopens the file at its first frame."""
        if self._place is None or pts is None:
            self._open.close()
            self._container, self._stream = self._open.enter_context(_opened(self._path))
        if pts not in (None, self._packets.pts[0]):
            self._container.seek(pts, stream=self._stream)
        self._frames = iter(self._container.decode(self._stream))

    def _forward(self, pts: int) -> Any:
        """Decode forward and return the frame at ``pts``; None where it is missing."""
        for frame in self._frames:
            self._place = place = frame.dts if frame.pts is None else frame.pts
            if place >= pts:
                return frame if place == pts else None
        return None


def _upright(frame: Any) -> torch.Tensor:
    """Return a frame as uint8 [height, width, 3], rotated by the quarter turns that the file says."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return torch.rot90(pixels, round(frame.rotation / 90), (0, 1)) if frame.rotation else pixels
