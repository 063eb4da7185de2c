"""Whether qwen-vl-utils can read videos on this machine: it chooses a reader by what is installed, working or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenvl.data.media.video.decode import TorchcodecBackend


def working_reader() -> str | None:
    """Return the name of the first of its readers that works here, None where none does."""
    for name, open_reader in _READERS.items():
        with contextlib.suppress(ImportError):
            open_reader()
            return name
    return None


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


def _import_decord() -> None:
    """Import decord.

    Raises:
        ImportError: it is not installed, or its library does not load.
    """
    # Loaded before torchcodec, decord's libraries take the place of torchcodec's zlib, and transformers, which opens
    # images with torchcodec, can no longer read a PNG in this process.
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        import torchcodec.decoders  # noqa: F401
    try:
        import decord  # noqa: F401
    except (RuntimeError, OSError) as error:
        raise ImportError(f"decord is installed but cannot load its library: {error}") from error


_READERS: Mapping[str, Callable[[], object]] = {"torchcodec": TorchcodecBackend, "decord": _import_decord}
