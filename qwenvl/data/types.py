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
"""Training settings that a sample may have, and that override those of its dataset."""

TRAINING_OPTIONS = (*SAMPLE_OPTIONS, "history")
"""Training settings that a dataset's entry may have, and that override those of the run."""

Source = str | bytes  # of an image or video: its path or URI, or the content of its file


@dataclass(frozen=True, slots=True)
class HuggingFaceDataset:
    """A dataset that the ``datasets`` library opens.

    Args:
        name: Full path of a folder, or a name on the Hugging Face hub.
        split: Name of the split.
        config: Name of the configuration; None where the dataset has only one.
        revision: Commit, branch or tag on the hub.
    """

    name: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One entry of ``--dataset_use``: where its annotations and media are, and how much of it is used.

    Args:
        name: Name in the registry.
        annotation_paths: Annotation files, in order; none with ``hf_dataset``.
        data_path: Folder that relative media paths start from; empty where annotations hold absolute paths.
        sampling_percent: Percentage of rows used: 50.0 is half of them, 250.0 each one twice and half of them again.
        hf_dataset: Hugging Face dataset that holds the rows, instead of annotation files.
        columns: Columns by field, for the fields of a record that have another name in the rows.
        options: Other keys of the entry.
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
        origin: Place of the sample, for messages.
        record: Fields of the sample, untouched.
        data_path: Folder that its relative media paths start from.
        allow_absolute: Whether its absolute media paths may lie outside ``data_path``.
        bbox_format: Unit of the coordinates in its texts, where the record does not say; see
            :mod:`qwenvl.data.conversation.boxes.convert`.
        options: Values of :data:`TRAINING_OPTIONS` in its dataset's entry.
    """

    origin: Origin
    record: Mapping[str, Any]
    data_path: str = ""
    allow_absolute: bool = False
    bbox_format: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, key: str) -> Any:
        """Return one of :data:`TRAINING_OPTIONS`: the sample's own, else its dataset's; None where neither has it."""
        own = self.record.get(key) if key in SAMPLE_OPTIONS else None
        return self.options.get(key) if own is None else own


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image, not opened.

    Args:
        source: Path, ``file://`` URI, ``data:`` URI or http(s) URL, as written; or the bytes of the file, where the
            annotations hold them.
        min_pixels: Lower limit of height x width after resizing; None for the limit of the run.
        max_pixels: Upper limit; None for the limit of the run.
    """

    source: Source
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class VideoItem:
    """One video, not opened. None means the run's own setting.

    Args:
        source: File (as for images), or the frames of a video as a tuple of images.
        fps: Frames per second to sample; for a tuple of frames, the rate at which they were taken.
        nframes: Number of frames to sample, instead of ``fps``.
        min_frames: Fewest frames.
        max_frames: Most frames.
        min_pixels: Lower limit of height x width of one frame, as in qwen-vl-utils.
        max_pixels: Upper limit of height x width of one frame, as in qwen-vl-utils.
        total_pixels: Upper limit of frames x height x width, the whole clip.
        video_start: First second used.
        video_end: Last second used.
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
        role: Speaker of the turn.
        parts: Text and media in the order they are rendered.
        extra: Other keys of the turn that chat templates know (``tool_calls``, ``reasoning_content``, ...).
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
    """Input of a chat template: the turns of one sample and the tools they may call.

    Args:
        messages: Turns of the sample.
        tools: Tools that they may call, as the record has them.
        unread_keys: Keys of the record, of its turns and of their text parts that nothing reads, as messages name them:
            ``'mood' of turns``.
        unconverted: Whether the record has a ``bbox_format`` and numbers, but no box or point was found.
        template_kwargs: Template arguments of the sample and its dataset, which override those of the run.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unread_keys: tuple[str, ...] = ()
    unconverted: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def media(self) -> tuple[ImageItem | VideoItem, ...]:
        """All media in the order they are rendered."""
        return tuple(part for message in self.messages for part in message.parts if not isinstance(part, TextPart))
