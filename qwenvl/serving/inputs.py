"""What a model is given for a sample: in training, by transformers' own processor, and through qwen-vl-utils.

The processor of the folder that is served is used as any user of the folder would, so that what differs from training
shows here and not in answers. Videos are decoded by the trainer's own decoder for transformers' processor, which then
samples frames by its own rule; qwen-vl-utils decodes by itself, where it has a reader that works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.video_utils import VideoMetadata

from qwenvl.data.collator import Collator
from qwenvl.data.conversation.turn_marks import as_template_message
from qwenvl.data.encoding.encoded import EncodedSample, Item, Plan
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.media.locate import MediaSources
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.types import ImageItem, Message, Sample, Source, TextPart, VideoItem
from qwenvl.models.vision.patchify import Patchify
from qwenvl.serving.video_reader import reader_obstacle
from qwenvl.utils.errors import SampleError

NOT_COMPARED = "not_compared"
"""Category of the error of a sample that this machine cannot compare, whatever a server would make of it."""

Element = Callable[[int, ImageItem | VideoItem], Mapping[str, Any]]
"""Of the number of a medium and the medium: what a message says of it."""


@dataclass(frozen=True)
class ModelInputs:
    """What a model is given for one sample.

    Args:
        input_ids: int64 [T].
        positions: int64 [3, T]: temporal, height and width.
        grids: (temporal, height, width) in patches, of the images and of the videos.
        patches: float32 [patches, values] of each, None where there are none.
        frames: source frames of each video.
        seconds: Time in the source of each of these frames.
    """

    input_ids: Tensor
    positions: Tensor
    grids: Mapping[str, list[list[int]]]
    patches: Mapping[str, Tensor | None]
    frames: tuple[tuple[int, ...], ...]
    seconds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Serving:
    """A folder that is to be served, and the training whose inputs it has to repeat.

    Args:
        processor: Processor of the folder.
        config: Config of the model.
        encoder: Encoder of training.
        trained: processor that the encoder was built from.
        template_kwargs: arguments of the chat template in training.
    """

    processor: Any
    config: PretrainedConfig
    encoder: SampleEncoder
    trained: Any
    template_kwargs: Mapping[str, Any]

    @cached_property
    def patchify(self) -> Patchify:
        """What cuts the patches of training."""
        return Patchify.from_processor(self.trained)

    @cached_property
    def model(self) -> Any:
        """The stock model without weights: its positions need none."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.config).model

    def sources(self, sample: Sample) -> MediaSources:
        """Return what finds the media of a sample."""
        return MediaSources(sample.data_path, self.encoder.allow_remote, sample.allow_absolute)


def training_inputs(serving: Serving, plan: Plan, encoded: EncodedSample) -> ModelInputs:
    """Return what training feeds: through the collator, and the patches cut as on the training device.

    Of a row that holds answers behind their prompts, the prompt of its last answer.
    """
    stop = None if plan.rendering.whole else plan.tokens.starts[-1]
    batch = Collator(serving.trained.tokenizer.pad_token_id, flatten=False)([Item((encoded,))])
    media = batch.get("media", ())
    patches = serving.patchify(batch["pixels"], media).split([t * h * w for _, t, h, w in media]) if media else ()
    is_video = [isinstance(medium, VideoPlan) for medium in plan.media]
    videos = [medium for medium in plan.media if isinstance(medium, VideoPlan)]
    chosen = {
        kind: [number for number, video in enumerate(is_video) if video == wanted]
        for kind, wanted in (("image", False), ("video", True))
    }
    return ModelInputs(
        batch["input_ids"][0, :stop],
        batch["position_ids"][1:, 0, :stop],
        {kind: [list(plan.media[number].grid) for number in numbers] for kind, numbers in chosen.items()},
        {kind: torch.cat([patches[n] for n in numbers]) if numbers else None for kind, numbers in chosen.items()},
        tuple(tuple(video.indices.tolist()) for video in videos),
        tuple(tuple(video.seconds.tolist()) for video in videos),
    )


def asked(serving: Serving, plan: Plan) -> tuple[Message, ...]:
    """Return the turns that a server is sent for the last answer of a row, as its client has them."""
    if plan.rendering.whole:
        return plan.conversation.messages
    return serving.encoder.template.with_thoughts_apart(plan.conversation).messages[: plan.rendering.turns[-1]]


def arguments_of(serving: Serving, plan: Plan) -> dict[str, Any]:
    """Return the template arguments that a server is sent for the last answer of a row."""
    own = plan.rendering.arguments[-1] if plan.rendering.arguments else {}
    return {**serving.template_kwargs, **own}


def stock_target(serving: Serving, plan: Plan) -> list[int] | None:
    """Return the ids of what the folder's template adds to the prompt of a row's last answer, once the answer is there.

    None where the prompt does not stay as it was: the template opens a thought that the answer does not have.
    """
    answers = serving.encoder.template.with_thoughts_apart(plan.conversation).messages[: plan.rendering.turns[-1] + 1]
    messages = [as_template_message(message, None) for message in answers]
    tools = [dict(tool) for tool in plan.conversation.tools] or None
    options = {"tools": tools, "tokenize": False, **arguments_of(serving, plan)}
    prompt = serving.processor.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    whole = serving.processor.apply_chat_template(messages, **options)
    if not whole.startswith(prompt):
        return None
    ids: list[int] = serving.processor.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    return ids


def template_inputs(serving: Serving, plan: Plan, sample: Sample) -> ModelInputs:
    """Return what ``AutoProcessor.apply_chat_template(messages, tokenize=True, return_dict=True)`` gives.

    Raises:
        SampleError: the processor refuses the sample.
    """
    reader, sources = serving.encoder.reader(sample), serving.sources(sample)
    items = [medium.item for medium in plan.media]
    videos = [_read_video(serving.processor, reader, item) for item in items if isinstance(item, VideoItem)]
    frames = iter(videos)

    def element(number: int, item: ImageItem | VideoItem) -> Mapping[str, Any]:
        del number
        if isinstance(item, VideoItem):
            return {"type": "video", "video": next(frames)[0]}
        return {"type": "image", "image": _opened(sources.locate(item.source))}

    options: dict[str, Any] = {"return_tensors": "pt"}
    if videos:  # as if the processor had decoded them: only the frames that it asks for are
        options |= {"video_metadata": [metadata for _, metadata in videos], "do_sample_frames": False}
    try:
        outputs = serving.processor.apply_chat_template(
            _messages(asked(serving, plan), element),
            tools=[dict(tool) for tool in plan.conversation.tools] or None,
            tokenize=True,
            return_dict=True,
            processor_kwargs=options,
            add_generation_prompt=not plan.rendering.whole,
            **arguments_of(serving, plan),
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise SampleError("serving", f"apply_chat_template refuses it: {error}", sample.origin) from error
    return _read(serving, outputs, [metadata for _, metadata in videos])


def utils_inputs(serving: Serving, plan: Plan, sample: Sample) -> ModelInputs:
    """Return what ``qwen_vl_utils.process_vision_info`` and the processor give, told the limits of training.

    Raises:
        SampleError: qwen-vl-utils or the processor refuses the sample; or (:data:`NOT_COMPARED`) qwen-vl-utils cannot
            read its videos here.
    """
    from qwen_vl_utils import process_vision_info  # only here: it is slow to import

    sources = serving.sources(sample)
    elements = [_utils_element(medium, sources, serving.encoder) for medium in plan.media]
    if obstacle := reader_obstacle([element["video"] for element in elements if "video" in element]):
        raise SampleError(NOT_COMPARED, obstacle, sample.origin)
    messages = _messages(asked(serving, plan), lambda number, item: elements[number])
    try:
        images, videos, options = process_vision_info(
            messages,
            return_video_kwargs=True,
            return_video_metadata=True,
            image_patch_size=serving.encoder.settings.patch_size,
        )
        text = serving.processor.apply_chat_template(
            messages,
            tools=[dict(tool) for tool in plan.conversation.tools] or None,
            tokenize=False,
            add_generation_prompt=not plan.rendering.whole,
            **arguments_of(serving, plan),
        )
        media = {"images": images} if images else {}
        metadata = [dict(one) for _, one in videos or ()]
        if videos:
            media |= {"videos": [frames for frames, _ in videos], "video_metadata": metadata, **options}
        outputs = serving.processor(text=[text], return_tensors="pt", do_resize=False, **media)
    except (OSError, ValueError, TypeError, RuntimeError, AssertionError, AttributeError) as error:
        # After any error of its reader, qwen-vl-utils tries torchvision.io.read_video, which new releases do not have.
        reason = (error.__context__ if isinstance(error, AttributeError) else None) or error
        raise SampleError("serving", f"qwen-vl-utils or the processor refuses it: {reason}", sample.origin) from error
    return _read(serving, outputs, metadata)


@dataclass(frozen=True)
class ImageFacts:
    """What of an image file is read in different ways.

    Args:
        from_file: it is given to processors as a path, not opened.
        turned: Its EXIF orientation turns it.
        transparent: it has transparency.
        mode: Pillow's mode.
        sixteen_bits: it has 16 bits a value.
    """

    from_file: bool
    turned: bool
    transparent: bool
    mode: str
    sixteen_bits: bool


def image_facts(serving: Serving, sample: Sample, item: ImageItem) -> ImageFacts:
    """Read what of an image may be read otherwise in serving than in training."""
    located = serving.sources(sample).locate(item.source)
    with Image.open(located if isinstance(located, str) else BytesIO(located)) as image:
        return ImageFacts(
            isinstance(located, str),
            image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
            "A" in image.getbands() or image.info.get("transparency") is not None,
            image.mode,
            image.mode.startswith("I;16") or any(";16" in str(tile.args) for tile in image.tile),
        )


def _read_video(processor: Any, reader: MediaReader, item: VideoItem) -> tuple[Tensor, VideoMetadata]:
    """Decode the frames that the processor samples when asked to; frame limits of the record itself are not used.

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
    samples = video.do_sample_frames or video.fps  # without a rate it could only take all of them
    indices = video.sample_frames(metadata) if samples else range(header.num_frames)
    metadata.frames_indices = np.asarray(indices, dtype=np.int64)
    return reader.read_frames(item, metadata.frames_indices), metadata


def _messages(messages: Sequence[Message], element: Element) -> list[dict[str, Any]]:
    """Return turns as users of a chat template write them: text alone as a string."""
    written, number = [], 0
    for message in messages:
        content: list[Mapping[str, Any]] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
            else:
                content.append(element(number, part))
                number += 1
        only_text = all(part["type"] == "text" for part in content)
        body: Any = "".join(part["text"] for part in content) if only_text else content
        written.append({"role": message.role, "content": body, **message.extra})
    return written


def _utils_element(medium: Any, sources: MediaSources, encoder: SampleEncoder) -> Mapping[str, Any]:
    """Return what qwen-vl-utils is told of a medium: its source, and the limits that training has for it."""
    item, settings = medium.item, encoder.settings
    if isinstance(item, ImageItem):
        limits = {"min_pixels": settings.image_min_pixels, "max_pixels": settings.image_max_pixels}
        own = {name: value for name in limits if (value := getattr(item, name)) is not None}
        return {"type": "image", "image": _opened(sources.locate(item.source)), **limits, **own}
    count = len(medium.indices)
    most = settings.video_max_pixels if item.total_pixels is None else item.total_pixels
    frame = min(most // count, item.max_pixels or settings.video_max_frame_pixels or most)
    by_clip = settings.family.video_layout == "frames"
    fewest = settings.video_min_pixels // count if by_clip else settings.frame_min_pixels
    told: dict[str, Any] = {
        "type": "video",
        "total_pixels": most,
        "max_pixels": frame,
        "min_pixels": min(frame, item.min_pixels or settings.video_min_frame_pixels or fewest),
    }
    if isinstance(item.source, tuple):
        return {**told, "video": [_opened(sources.locate(one)) for one in item.source], "sample_fps": item.fps or 2.0}
    told["video"] = sources.locate(item.source)
    told |= {name: getattr(item, name) for name in ("video_start", "video_end") if getattr(item, name) is not None}
    if item.nframes is not None:
        return told | {"nframes": item.nframes}
    return told | {
        "fps": item.fps or settings.video_fps,
        "min_frames": item.min_frames or settings.video_min_frames,
        "max_frames": item.max_frames or settings.video_max_frames,
    }


def _opened(located: Source) -> Any:
    """Return a path as it is, and the bytes of a file as the image they hold."""
    return located if isinstance(located, str) else Image.open(BytesIO(located))


def _read(serving: Serving, outputs: Mapping[str, Any], metadata: Sequence[Any]) -> ModelInputs:
    """Return a stock processor's outputs for one sample, with the positions that the stock model makes of them."""
    known = inspect.signature(serving.model.get_rope_index).parameters
    positions, _ = serving.model.get_rope_index(**{name: value for name, value in outputs.items() if name in known})
    facts = [one if isinstance(one, Mapping) else vars(one) for one in metadata]
    frames = tuple(tuple(int(index) for index in one["frames_indices"]) for one in facts)
    speeds = [float(one["fps"]) for one in facts]
    grids = {"image": outputs.get("image_grid_thw"), "video": outputs.get("video_grid_thw")}
    return ModelInputs(
        outputs["input_ids"][0],
        positions[-3:, 0],
        {kind: [] if grid is None else grid.tolist() for kind, grid in grids.items()},
        {"image": outputs.get("pixel_values"), "video": outputs.get("pixel_values_videos")},
        frames,
        tuple(tuple(index / fps for index in one) for one, fps in zip(frames, speeds, strict=True)),
    )
