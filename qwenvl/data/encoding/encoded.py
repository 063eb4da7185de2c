"""Records of the encoding stage: a sample before and after its media are decoded, and the events to report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qwenvl.data.conversation.chat_template import Rendering
from qwenvl.data.encoding.tokenization import Tokens
from qwenvl.data.media.resize import MediaPlan
from qwenvl.data.types import Conversation
from qwenvl.utils.errors import Origin, UserError


@dataclass(frozen=True, slots=True)
class Event:
    """Something about a sample that the run has to count or report.

    Args:
        kind: ``bad`` (left out), ``overlength`` (left out), ``truncated``, ``unread_key`` (once per dataset and key),
            or one of :data:`qwenvl.data.sample_stats.REMARKS`.
        dataset: Registry name of its dataset.
        message: Origin and reason, in words.
        record: Line for ``bad_samples.jsonl``.
    """

    kind: str
    dataset: str
    message: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """A sample before anything is decoded: its exact tokens, from headers alone.

    Args:
        conversation: Conversation to render, without the turns that the over-length policy left out.
        rendering: Rendered text.
        media: Plans of its images and videos, in token order.
        tokens: Ids, labels and positions.
        events: Events to report.
    """

    conversation: Conversation
    rendering: Rendering
    media: tuple[MediaPlan, ...]
    tokens: Tokens
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Medium:
    """A decoded and resized image or video.

    Args:
        frames: uint8 [frames, height, width, 3] in pixels, RGB, contiguous; one frame for an image.
        grid: (temporal, height, width) in patches. A video with fewer frames than its patches hold repeats the last.
    """

    frames: torch.Tensor
    grid: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(frames, temporal, height, width): the number of frames, and the grid."""
        return (len(self.frames), *self.grid)


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample that is ready for the model.

    Args:
        tokens: Ids, labels and positions.
        media: Images and videos, in token order.
        origin: Place of the sample, for messages.
        target: Target of the task, see :mod:`qwenvl.data.encoding.targets`.
    """

    tokens: Tokens
    media: tuple[Medium, ...] = ()
    origin: Origin | None = None
    target: Any = None


@dataclass(frozen=True, slots=True)
class Item:
    """Output of the dataset for one index.

    Args:
        samples: Usable samples; several for a packed row, none for a filler or a sample left out.
        events: Events to report.
        error: Problem that must stop the run (workers return it; the training process raises it).
    """

    samples: tuple[EncodedSample, ...] = ()
    events: tuple[Event, ...] = ()
    error: UserError | None = None
