"""Images and frames as files beside the page, at the size that the model gets, with thumbnails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwenvl.data.encoding.encoded import Medium
from qwenvl.data.media.locate import describe
from qwenvl.data.media.resize import ImagePlan, MediaPlan

THUMBNAIL = (420, 420)
"""Most pixels (width, height) of a thumbnail."""

SHOWN_FRAMES = 32
"""Most frames shown of a video, evenly spread."""

_LOSSLESS_SIDE = 160  # small drawings and digits suffer from JPEG


class ImageFiles:
    """Writes images into a folder, named by numbers: names from the data never become file names.

    Args:
        site: Folder of the page.
        folder: Folder of the images, relative to ``site``.
    """

    def __init__(self, site: Path, folder: str = "media") -> None:
        self._site = site
        self._folder = folder
        self._count = 0
        (site / folder).mkdir(parents=True, exist_ok=True)

    def write(self, pixels: torch.Tensor) -> tuple[str, str]:
        """Write an image, uint8 [height, width, 3]; return the paths of it and its thumbnail, relative to the page."""
        image = Image.fromarray(pixels.numpy())
        name = f"{self._folder}/{self._count:06d}"
        self._count += 1
        ending = "png" if max(image.size) <= _LOSSLESS_SIDE else "jpg"
        full = f"{name}.{ending}"
        image.save(self._site / full, quality=90)
        if image.width <= THUMBNAIL[0] and image.height <= THUMBNAIL[1]:
            return full, full
        image.thumbnail(THUMBNAIL)
        small = f"{name}_small.jpg"
        image.save(self._site / small, quality=82)
        return full, small


def medium_record(plan: MediaPlan, medium: Medium | None, files: ImageFiles | None) -> dict[str, Any]:
    """Return the record of an image or video for the page, and write its files.

    Args:
        plan: Plan of the medium: its size, grid and frames.
        medium: Pixels of the medium; None if it could not be decoded.
        files: Writer of its images.
    """
    source = plan.item.source
    name = f"{len(source)} frames, {describe(source[0])} ..." if isinstance(source, tuple) else describe(source)
    record: dict[str, Any] = {"name": name, "size": [plan.resized[1], plan.resized[0]], "grid": list(plan.grid)}
    if isinstance(plan, ImagePlan):
        record |= {"kind": "image", "before": [plan.size[1], plan.size[0]]}
        times: list[float | None] = [None]
        shown = np.zeros(1, np.int64)
    else:
        record |= {"kind": "video", "fps": plan.fps, "stamps": [round(one, 2) for one in plan.timestamps]}
        record |= {"sampled": len(plan.indices), "source_frames": plan.num_frames}
        times = [round(second, 2) for second in plan.seconds.tolist()]
        count = min(SHOWN_FRAMES, len(times))
        shown = np.linspace(0, len(times) - 1, count).round().astype(np.int64)
    frames = []
    for place in shown.tolist() if medium is not None and files is not None else []:
        assert medium is not None and files is not None
        full, small = files.write(medium.frames[place])
        frames.append({"full": full, "small": small, "time": times[place]})
    return {**record, "frames": frames}
