"""The records that pass between the stages of the data path. Nothing here is decoded or touches a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwenvl.utils.errors import Origin

Role = Literal["system", "user", "assistant", "tool"]
History = Literal["exact", "last", "as_rendered"]
LossOn = Literal["all", "last_turn", "answers", "thoughts"]

SAMPLE_OPTIONS = ("chat_template_kwargs", "loss_on")
"""Settings of training that a sample may have, over those of its dataset."""

TRAINING_OPTIONS = (*SAMPLE_OPTIONS, "history")
"""Settings of training that a dataset's entry may have, over those of the run."""

Source = str | bytes  # of a picture or video: where it is, or the file itself


@dataclass(frozen=True, slots=True)
class HuggingFaceDataset:
    """A dataset that the ``datasets`` library opens.

    Args:
        name: a folder, by its full path; or a name on the Hugging Face hub.
        split: which of its splits.
        config: which of its configurations; None where it has one.
        revision: commit, branch or tag on the hub.
    """

    name: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One entry of ``--dataset_use``: where its annotations and media are, and how much of it is used.

    Args:
        name: name in the registry.
        annotation_paths: annotation files, in order; none with ``hf_dataset``.
        data_path: folder that relative media paths start from; empty where annotations hold absolute paths.
        sampling_percent: percent of the rows used: 50.0 is half of them, 250.0 each one twice and half of them again.
        hf_dataset: what holds the rows instead of annotation files.
        columns: for fields of a record that have another name in the rows, that name.
        options: the entry's other keys.
    """

    name: str
    annotation_paths: tuple[str, ...]
    data_path: str
    sampling_percent: float = 100.0
    hf_dataset: HuggingFaceDataset | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation as it stands in the annotation file.

    Args:
        origin: where it stands.
        record: its fields, untouched.
        data_path: folder that its relative media paths start from.
        allow_absolute: its absolute media paths may lie outside ``data_path``.
        bbox_format: what the coordinates in its texts count, where the record does not say; see
            :mod:`qwenvl.data.conversation.boxes.convert`.
        options: Of :data:`TRAINING_OPTIONS`, those of its dataset's entry.
    """

    origin: Origin
    record: Mapping[str, Any]
    data_path: str = ""
    allow_absolute: bool = False
    bbox_format: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, key: str) -> Any:
        """Return one of :data:`TRAINING_OPTIONS`: the sample's own, else its dataset's; None where neither says any."""
        own = self.record.get(key) if key in SAMPLE_OPTIONS else None
        return self.options.get(key) if own is None else own


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image, not opened.

    Args:
        source: path, ``file://`` URI, ``data:`` URI or http(s) URL, as written; or the bytes of the file, where the
            annotations hold them.
        min_pixels: lower limit of height x width after resizing; None for the run's own.
        max_pixels: upper limit; None for the run's own.
    """

    source: Source
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class VideoItem:
    """One video, not opened. None means the run's own setting.

    Args:
        source: a file (as for images), or the frames of a video as a tuple of images.
        fps: frames a second to sample; for a tuple of frames, the rate they were taken at.
        nframes: number of frames to sample, instead of ``fps``.
        min_frames: fewest frames.
        max_frames: most frames.
        min_pixels: lower limit of height x width of one frame, as in qwen-vl-utils.
        max_pixels: upper limit of height x width of one frame, as in qwen-vl-utils.
        total_pixels: upper limit of frames x height x width, the whole clip.
        video_start: first second used.
        video_end: last second used.
    """

    source: Source | tuple[Source, ...]
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    video_start: float | None = None
    video_end: float | None = None


@dataclass(frozen=True, slots=True)
class TextPart:
    """A stretch of text, exactly as it is to be rendered."""

    text: str


Part = TextPart | ImageItem | VideoItem


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Args:
        role: who speaks.
        parts: text and media in the order they are rendered.
        extra: the turn's other keys that chat templates know (``tool_calls``, ``reasoning_content``, ...).
        weight: Factor of the loss of an assistant turn's tokens; 0 where it is not trained. Other turns never are.
    """

    role: Role
    parts: tuple[Part, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def trained(self) -> bool:
        """Whether an assistant turn is trained."""
        return self.weight > 0

    @property
    def text(self) -> str:
        """All text of the turn, without its media."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template renders: the turns of one sample and the tools they may call.

    Args:
        messages: the turns.
        tools: what they may call, as the record has it.
        unread_keys: Keys of the record, of its turns and of their text parts that nothing reads, as messages name them:
            ``'mood' of turns``.
        unconverted: The record says what its coordinates count, it has numbers, and no box or point was found.
        template_kwargs: Template arguments of the sample and its dataset, over those of the run.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unread_keys: tuple[str, ...] = ()
    unconverted: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def media(self) -> tuple[ImageItem | VideoItem, ...]:
        """All media in the order they are rendered."""
        return tuple(part for message in self.messages for part in message.parts if not isinstance(part, TextPart))
