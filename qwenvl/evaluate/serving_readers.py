"""Whether qwen-vl-utils can read videos on this machine: it chooses a reader by what is installed, working or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenvl.data.video import DecordBackend, TorchcodecBackend

_READERS: Mapping[str, Callable[[], object]] = {"torchcodec": TorchcodecBackend, "decord": DecordBackend}


def reader_obstacle(videos: Sequence[Any]) -> str:
    """Say why qwen-vl-utils cannot read videos here; empty where it can.

    Args:
        videos: Paths, bytes of files, or lists of frames.
    """
    if any(isinstance(video, bytes) for video in videos):
        return "qwen-vl-utils reads videos from files alone, and the sample has one that is not in a file"
    if not any(isinstance(video, str) for video in videos):
        return ""
    from qwen_vl_utils.vision_process import get_video_reader_backend  # only here: it is slow to import

    name = get_video_reader_backend()
    try:
        _READERS.get(name, _import_torchvision_reader)()
    except ImportError as error:
        return (
            f"qwen-vl-utils reads videos with {name} here, which does not work ({error}); set "
            f"FORCE_QWENVL_VIDEO_READER to one that does: {' or '.join(_READERS)}"
        )
    return ""


def _import_torchvision_reader() -> None:
    """Import the reader that qwen-vl-utils has besides; new releases of torchvision have none."""
    from torchvision.io import read_video  # noqa: F401
