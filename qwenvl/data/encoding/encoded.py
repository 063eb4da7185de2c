"""The records of this stage: a sample before and after its media are decoded, and what there is to report of it."""

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
    """Something about a sample that the run has to count or say.

    Args:
        kind: ``bad`` (left out), ``overlength`` (left out), ``truncated``, ``unread_key`` (once a dataset and key), or
            one of :data:`qwenvl.data.sample_stats.REMARKS`.
        dataset: registry name of its dataset.
        message: origin and reason, for a person.
        record: what ``bad_samples.jsonl`` says of it.
    """

    kind: str
    dataset: str
    message: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """A sample before anything is decoded: exact tokens, from headers alone.

    Args:
        conversation: what is rendered, after turns were cut where the policy says so.
        rendering: the rendered text.
        media: what becomes of its pictures and videos, in token order.
        tokens: ids, labels and positions.
        events: what there is to report.
    """

    conversation: Conversation
    rendering: Rendering
    media: tuple[MediaPlan, ...]
    tokens: Tokens
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or video that is decoded and resized.

    Args:
        frames: uint8 [frames, height, width, 3] in pixels, RGB, contiguous; one frame for a picture.
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
        tokens: ids, labels and positions.
        media: its pictures and videos, in token order.
        origin: where it stands, for messages.
        target: what a task wants to know of it, see :mod:`qwenvl.data.encoding.targets`.
    """

    tokens: Tokens
    media: tuple[Medium, ...] = ()
    origin: Origin | None = None
    target: Any = None


@dataclass(frozen=True, slots=True)
class Item:
    """What the dataset gives for one index.

    Args:
        samples: usable samples; several for a packed row, none for a filler or a sample left out.
        events: what there is to report.
        error: the problem that must stop the run (workers hand it over; the training process raises it).
    """

    samples: tuple[EncodedSample, ...] = ()
    events: tuple[Event, ...] = ()
    error: UserError | None = None
