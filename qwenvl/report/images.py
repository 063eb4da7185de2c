"""Pictures and frames of videos as parts of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import numpy as np
from PIL import Image

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.types import VideoItem
from qwenvl.metrics.boxes import Box

SHOWN_FRAMES = 4
LONGEST_SIDE = 400
"""Pixels of a thumbnail."""

_LOSSLESS_SIDE = 160  # small drawings and digits suffer from JPEG


def data_uri(picture: Image.Image, longest: int = LONGEST_SIDE) -> str:
    """Return a picture as an address that holds all of it: shrunk, and JPEG unless it is small.

    Args:
        picture: of any size.
        longest: pixels of its longest side, at most.
    """
    picture = picture.convert("RGB")
    small = max(picture.size) <= _LOSSLESS_SIDE
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def image_tag(picture: Image.Image, name: str, longest: int = LONGEST_SIDE) -> str:
    """Return an ``<img>`` of a picture, with the arguments of :func:`data_uri`."""
    return f'<img alt="{escape(name)}" src="{data_uri(picture, longest)}">'


def video_frames(reader: MediaReader, item: VideoItem) -> list[Image.Image]:
    """Return a few frames of a video, from its first to its last.

    Raises:
        SampleError: it cannot be read.
    """
    count = reader.video_header(item).num_frames
    indices = np.linspace(0, count - 1, min(SHOWN_FRAMES, count)).round().astype(np.int64)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in reader.read_frames(item, indices)]


def with_boxes(
    picture: Image.Image,
    canvas: tuple[int, int],
    expected: Iterable[Box],
    found: Iterable[Box],
    *,
    name: str | None = None,
    again: bool = False,
) -> str:
    """Return a drawing of a picture under boxes.

    Args:
        picture: as it is.
        canvas: its (width, height) in what the boxes count.
        expected: dashed.
        found: the model's.
        name: of the picture in the page, where it is drawn more than once.
        again: the picture of this name stands in the page already, and is not held twice.
    """
    width, height = 1000.0, 1000.0 * picture.height / picture.width
    across, down = width / canvas[0], height / canvas[1]
    lines = [(box, "expected-line") for box in expected] + [(box, "answer-line") for box in found]
    rectangles = ""
    for (left, top, right, bottom), style in lines:
        place = (
            f'x="{left * across:g}" y="{top * down:g}" width="{max(0, right - left) * across:g}" '
            f'height="{max(0, bottom - top) * down:g}"'
        )
        rectangles += f'<rect class="expected-box" {place}/><rect class="{style}" {place}/>'
    own = f' id="{name}"' if name else ""
    image = (
        f'<use href="#{name}"/>'
        if again
        else f'<image{own} href="{data_uri(picture)}" width="{width:g}" height="{height:g}" '
        'preserveAspectRatio="none"/>'
    )
    return (
        f'<svg viewBox="-8 -8 {width + 16:g} {height + 16:g}" role="img" aria-label="picture with boxes">'
        f"{image}{rectangles}</svg>"
    )
