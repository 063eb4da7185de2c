"""Images and video frames as parts of a page."""

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


def data_uri(image: Image.Image, longest: int = LONGEST_SIDE) -> str:
    """Return an image as a data URI: shrunk, and as JPEG unless it is small.

    Args:
        image: Image of any size.
        longest: Greatest length of the longest side, in pixels.
    """
    image = image.convert("RGB")
    small = max(image.size) <= _LOSSLESS_SIDE
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if small else "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def image_tag(image: Image.Image, name: str, longest: int = LONGEST_SIDE) -> str:
    """Return the ``<img>`` tag of an image; see :func:`data_uri`."""
    return f'<img alt="{escape(name)}" src="{data_uri(image, longest)}">'


def video_frames(reader: MediaReader, item: VideoItem) -> list[Image.Image]:
    """Return a few frames of a video, from its first to its last.

    Raises:
        SampleError: The video cannot be read.
    """
    count = reader.video_header(item).num_frames
    indices = np.linspace(0, count - 1, min(SHOWN_FRAMES, count)).round().astype(np.int64)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in reader.read_frames(item, indices)]


def with_boxes(
    image: Image.Image,
    canvas: tuple[int, int],
    expected: Iterable[Box],
    found: Iterable[Box],
    *,
    name: str | None = None,
    again: bool = False,
) -> str:
    """Return an SVG drawing of boxes over an image.

    Args:
        image: Image of any size.
        canvas: (width, height) of the image in the units of the boxes.
        expected: Annotated boxes, drawn dashed.
        found: Boxes of the model.
        name: Id of the image in the page if it is drawn more than once.
        again: Refer to the image with this ``name``, which the page holds already.
    """
    width, height = 1000.0, 1000.0 * image.height / image.width
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
    layer = (
        f'<use href="#{name}"/>'
        if again
        else f'<image{own} href="{data_uri(image)}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"/>'
    )
    return (
        f'<svg viewBox="-8 -8 {width + 16:g} {height + 16:g}" role="img" aria-label="image with boxes">'
        f"{layer}{rectangles}</svg>"
    )
