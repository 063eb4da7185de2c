"""Answers of a trained folder, through the stock classes of transformers: what any user of the folder would get.

Nothing here knows of training. Prompts come from annotation records, are rendered by the folder's own chat template,
and are answered in batches that are padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from qwenvl.data.boxes import bbox_format
from qwenvl.data.media import MediaReader
from qwenvl.data.messages import build_conversation
from qwenvl.data.types import ImageItem, Message, Sample, TextPart, VideoItem
from qwenvl.utilities.errors import SampleError, UserError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        messages: turns up to the question.
        reader: opens the media that the turns name.
    """

    messages: tuple[Message, ...]
    reader: MediaReader


@dataclass(frozen=True)
class Answerer:
    """A model folder, opened.

    Args:
        model: on its device, in evaluation mode.
        processor: of the same folder.
    """

    model: Any
    processor: Any


def open_answerer(folder: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> Answerer:
    """Open a model folder with ``AutoModelForImageTextToText`` and ``AutoProcessor``.

    Args:
        folder: model folder, or a Hugging Face id.
        device: such as ``cpu`` or ``cuda:1``; None for the accelerator where there is one.
        dtype: of the weights; None for the one they are saved in.

    Raises:
        UserError: the folder cannot be opened.
    """
    device = device or _default_device()
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto")
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be opened as a model with its processor: {first_line}") from error
    return Answerer(model.to(device).eval(), processor)


def split_sample(sample: Sample) -> tuple[Prompt, str]:
    """Return what a sample asks before its last answer, and that answer.

    Raises:
        SampleError: the record cannot be used, does not end in an answer, or has a ``bbox_format``, whose boxes only
            training converts.
    """
    if bbox_format(sample) is not None:
        reason = "its boxes are not as the model writes them. Convert them (qwenvl.data.boxes) and drop bbox_format."
        raise SampleError("bad_boxes", reason, sample.origin)
    messages = build_conversation(sample, ()).messages
    if messages[-1].role != "assistant" or len(messages) < 2:
        raise SampleError("no_answer", "the sample does not end in an answer to a question.", sample.origin)
    return Prompt(messages[:-1], MediaReader(sample.data_path, allow_absolute=sample.allow_absolute)), messages[-1].text


def generate(
    answerer: Answerer, prompts: Sequence[Prompt], *, max_new_tokens: int = 128, batch_size: int = 16
) -> list[str]:
    """Return the greedy answer to every prompt, in order.

    Args:
        answerer: from :func:`open_answerer`.
        prompts: the questions.
        max_new_tokens: longest answer; the folder's end-of-turn tokens end it earlier.
        batch_size: prompts answered at once.

    Raises:
        SampleError: a picture or video cannot be read.
    """
    answers: list[str] = []
    for batch in _chunks(prompts, batch_size):
        inputs = encode_prompts(answerer.processor, batch).to(answerer.model.device)
        with torch.inference_mode():
            output = answerer.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += answerer.processor.batch_decode(
            new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return answers


def encode_prompts(processor: Any, prompts: Sequence[Prompt]) -> Any:
    """Render and tokenize prompts and read their media, as the processor's own settings say.

    Returns:
        ``BatchFeature`` with ``input_ids`` and ``attention_mask`` int64 [B, T], padded on the left, and the media's
        ``pixel_values``, ``image_grid_thw``, ``pixel_values_videos`` and ``video_grid_thw`` where there are any.
    """
    texts = [
        processor.apply_chat_template(template_messages(prompt.messages), tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    media: dict[str, Any] = {}
    if images := [prompt.reader.read_image(item) for prompt, item in _media(prompts, ImageItem)]:
        media["images"] = images
    if videos := [read_video(processor, prompt.reader, item) for prompt, item in _media(prompts, VideoItem)]:
        media["videos"] = [frames for frames, _ in videos]
        media["video_metadata"] = [metadata for _, metadata in videos]
        media["do_sample_frames"] = False  # already done: only these frames were decoded
    return processor(text=texts, return_tensors="pt", padding=True, padding_side="left", **media)


def template_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return turns in the form that chat templates take."""
    return [
        {"role": message.role, "content": [_template_part(part) for part in message.parts], **message.extra}
        for message in messages
    ]


def read_video(processor: Any, reader: MediaReader, item: VideoItem) -> tuple[torch.Tensor, VideoMetadata]:
    """Decode the frames that the processor samples; frame limits of the record itself are not used.

    Returns:
        uint8 [n, 3, height, width], and the metadata from which the processor writes timestamps.
    """
    header = reader.video_header(item)
    metadata = VideoMetadata(
        total_num_frames=header.num_frames,
        fps=header.fps,
        height=header.height,
        width=header.width,
        duration=header.num_frames / header.fps,
    )
    video = processor.video_processor
    indices = video.sample_frames(metadata) if video.do_sample_frames else range(header.num_frames)
    metadata.frames_indices = np.asarray(indices, dtype=np.int64)
    return reader.read_frames(item, metadata.frames_indices), metadata


def _template_part(part: TextPart | ImageItem | VideoItem) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, ImageItem) else "video"}


def _media(prompts: Sequence[Prompt], kind: type[ImageItem] | type[VideoItem]) -> Iterator[tuple[Prompt, Any]]:
    """Yield the media of one kind with their prompt, in the order they are rendered."""
    for prompt in prompts:
        for message in prompt.messages:
            for part in message.parts:
                if isinstance(part, kind):
                    yield prompt, part


def _chunks(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _default_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"
