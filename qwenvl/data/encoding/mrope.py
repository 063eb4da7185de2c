"""Compute M-RoPE positions: the place of every token in time, height and width.

Source: section 2.1 of the Qwen2-VL paper (Wang et al., 2024): each modality starts one above the largest position of
the previous one. ``get_rope_index`` of transformers 4, vLLM and the official recipe do the same. From 5.3 on,
transformers counts only the height and width of a video: text after a clip of Qwen2-VL or Qwen2.5-VL that has more
temporal positions than it is wide then overlaps with its frames, unlike in the published models and on servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class VisionSpan:
    """A run of image or video tokens.

    Args:
        start: Index of its first token.
        grid: (temporal, height, width) in merged tokens; their product is the number of tokens.
        temporal_step: Distance of neighbouring temporal positions: 1.0, or ``tokens_per_second`` x seconds in families
            with timed positions.
    """

    start: int
    grid: tuple[int, int, int]
    temporal_step: float = 1.0

    @property
    def stop(self) -> int:
        """Index after its last token."""
        return self.start + self.grid[0] * self.grid[1] * self.grid[2]


def position_ids(length: int, spans: Sequence[VisionSpan]) -> torch.Tensor:
    """Return int64 [4, length]: row 0 counts tokens, rows 1-3 are temporal, height and width positions.

    Each text token advances all three by one. An image of h x w tokens spans a box that starts at the next position;
    text after it goes on max(h, w) positions later. Text after a video starts one above the video's largest position,
    which may be the temporal one. Worked example with two text tokens, a 1 x 2 x 2 image and one text token: temporal
    0 1 2 2 2 2 4, height 0 1 2 2 3 3 4, width 0 1 2 3 2 3 4.

    Args:
        length: Number of tokens of one sample.
        spans: Runs of vision tokens in the sample, in order, not overlapping.
    """
    rows = np.empty((4, length), dtype=np.int64)
    rows[0] = np.arange(length)
    cursor = position = 0
    for span in spans:
        position = _fill_text(rows, cursor, span.start, position)
        box = rows[1:, span.start : span.stop]
        _fill_box(box.reshape(3, *span.grid), span.temporal_step, position)
        position = int(box.max()) + 1
        cursor = span.stop
    _fill_text(rows, cursor, length, position)
    return torch.from_numpy(rows)


def _fill_text(rows: np.ndarray, start: int, stop: int, position: int) -> int:
    """Number the text tokens in place and return the next free position."""
    count = stop - start
    rows[1:, start:stop] = np.arange(position, position + count)
    return position + count


def _fill_box(box: np.ndarray, temporal_step: float, position: int) -> None:
    """Write the positions of a span's tokens, int64 [3, temporal, height, width], from ``position`` on."""
    times = np.arange(box.shape[1], dtype=np.float32) * np.float32(temporal_step)  # float32, as transformers has it
    places = np.ix_(times.astype(np.int64), np.arange(box.shape[2]), np.arange(box.shape[3]))
    for axis in range(3):
        box[axis] = position + places[axis]
