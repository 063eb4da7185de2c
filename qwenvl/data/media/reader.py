"""Open images and videos: sizes from their headers while planning, pixels in the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from qwenvl.data.media import images
from qwenvl.data.media.locate import MediaSources, describe
from qwenvl.data.media.video.backend import Shrink, VideoBackend, VideoHeader, as_they_are
from qwenvl.data.media.video.decode import FallbackBackend, choose_backend
from qwenvl.data.types import ImageItem, Source, VideoItem
from qwenvl.utils.deadline import call_within
from qwenvl.utils.errors import SampleError

FRAMES_PER_SECOND = 2.0  # of a list of frames without a rate: the default of qwen-vl-utils (sample_fps)

Decoded = TypeVar("Decoded")


class MediaReader:
    """Opens the media of one dataset. Cheap to make and to send to other processes.

    Args:
        data_path: Folder that relative paths start from, or "".
        allow_remote: Whether http(s) URLs are fetched, again for every use.
        allow_absolute: Whether absolute paths may lie outside ``data_path``.
        keep_images: Whether the whole file of an image is read with its size and kept for decoding, rather than opened
            (or fetched) twice; for readers of a single sample.
        video_timeout: Seconds that opening or decoding a video may take.

    Every method raises :class:`SampleError` for media that cannot be used, naming the file: ``missing_file``,
    ``zero_byte``, ``truncated``, ``wrong_type``, ``unreadable_file``, ``decompression_bomb``, ``outside_data_path``,
    ``remote_not_allowed``, ``timeout``.
    """

    def __init__(
        self,
        data_path: str,
        allow_remote: bool = False,
        allow_absolute: bool = False,
        keep_images: bool = False,
        video_timeout: float = 120.0,
    ) -> None:
        self._sources = MediaSources(data_path, allow_remote, allow_absolute)
        self._kept: dict[Source, bytes] | None = {} if keep_images else None
        self._video_timeout = video_timeout

    def image_size(self, item: ImageItem) -> tuple[int, int]:
        """Return (height, width) in pixels, EXIF orientation applied; no pixel is decoded."""
        with self._naming(item.source):
            return images.image_size(self._locate_image(item.source))

    def read_image(self, item: ImageItem) -> Image.Image:
        """Decode an image to RGB, EXIF orientation applied, transparency laid on white."""
        with self._naming(item.source):
            return images.read_image(self._locate_image(item.source))

    def read_pixels(self, item: ImageItem) -> torch.Tensor:
        """Decode an image to uint8 [3, height, width], RGB interleaved; the same as :meth:`read_image`, but faster."""
        with self._naming(item.source):
            return images.read_pixels(self._locate_image(item.source))

    def video_header(self, item: VideoItem) -> VideoHeader:
        """Return a video's number of frames, average frames per second, and size in pixels."""
        if isinstance(item.source, tuple):
            height, width = self._size_of_frames(item.source)
            return VideoHeader(len(item.source), item.fps or FRAMES_PER_SECOND, height, width)
        return self._decoding(item.source, lambda backend, located: backend.header(located))

    def read_frames(self, item: VideoItem, indices: np.ndarray, shrink: Shrink = as_they_are) -> torch.Tensor:
        """Decode the frames at ``indices`` (int64 [n]) to uint8 [n, 3, height, width], RGB.

        ``shrink`` is applied to some of them at a time, so that a long video is never in memory at its full size.
        """
        if isinstance(item.source, tuple):
            return self._read_images([item.source[index] for index in indices.tolist()], shrink)
        return self._decoding(item.source, lambda backend, located: backend.frames(located, indices, shrink))

    def _decoding(self, source: Source, decode: Callable[[VideoBackend, Source], Decoded]) -> Decoded:
        with self._naming(source):
            backend, located = FallbackBackend(choose_backend()), self._sources.locate(source)
            try:
                return call_within(self._video_timeout, lambda: decode(backend, located))
            except TimeoutError as error:
                raise SampleError(
                    "timeout",
                    f"{backend.name} has not read the video after {self._video_timeout:g} s (--video_timeout). Raise "
                    "that if the video is only long; otherwise its disk does not answer, or the file is damaged.",
                ) from error

    def _locate_image(self, source: Source) -> Source:
        if self._kept is None:
            return self._sources.locate(source)
        if source not in self._kept:
            self._kept[source] = images.read_file(self._sources.locate(source))
        return self._kept[source]

    def named(self, error: SampleError, item: ImageItem | VideoItem) -> SampleError:
        """Return an error whose reason begins with the name of the image or video, or of the first frame of a list."""
        return self._named(error, item.source[0] if isinstance(item.source, tuple) else item.source)

    def _named(self, error: SampleError, source: Source) -> SampleError:
        name = self._sources.describe(source)
        return error if name in error.reason else SampleError(error.category, f"{name}: {error.reason}")

    @contextmanager
    def _naming(self, source: Source) -> Iterator[None]:
        """Begin the reason of a SampleError with the name of the image or video."""
        try:
            yield
        except SampleError as error:
            raise self._named(error, source) from error.__cause__

    def _size_of_frames(self, frames: Sequence[Source]) -> tuple[int, int]:
        sizes = []
        for frame in frames:
            with self._naming(frame):
                sizes.append(images.image_size(self._sources.locate(frame)))
        return _common_size(frames, sizes)

    def _read_images(self, frames: Sequence[Source], shrink: Shrink) -> torch.Tensor:
        shrunk, sizes = [], []
        for frame in frames:
            with self._naming(frame):
                image = images.read_pixels(self._sources.locate(frame))
            sizes.append((image.shape[1], image.shape[2]))
            _common_size(frames[: len(sizes)], sizes)
            shrunk.append(shrink(image[None])[0])
        return torch.stack([image.permute(1, 2, 0) for image in shrunk]).permute(0, 3, 1, 2)


def _common_size(frames: Sequence[Source], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size that all frames of a video have.

    Raises:
        SampleError: the sizes differ.
    """
    for frame, size in zip(frames, sizes, strict=True):
        if size != sizes[0]:
            raise SampleError(
                "bad_record",
                f"the frames of a video differ in size: {describe(frames[0])} is {sizes[0][1]} x {sizes[0][0]}, "
                f"{describe(frame)} is {size[1]} x {size[0]}. Resize them to one size.",
            )
    return sizes[0]
