"""Open a checkpoint's processor, give it the limits of the run, and build the encoder of samples from it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AddedToken, AutoProcessor, PretrainedConfig, ProcessorMixin
from transformers.image_utils import PILImageResampling

from qwenvl.config import DataArguments
from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.tokenization import Tokenizer, VisionTokens
from qwenvl.data.media.resize import VisionSettings
from qwenvl.families import Family, register_classes_of
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

_PATCH_SIZES = ("patch_size", "merge_size", "temporal_patch_size")
_VISION_PAD = "<|vision_pad|>"
_FOREIGN = "The processor files in the checkpoint's folder belong to another model. Copy the right ones there."

MARKED_VIDEO, BARE_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>"
"""A video in the text of Qwen3-VL's templates, and the form of it whose prompt has the tokens of training.

transformers from 5.10 on keeps the outer pair of markers, besides those around each frame; training has the latter
alone, as transformers 4 and the official recipe. All versions read the bare form."""


def open_processor(
    model_name_or_path: str, cache_dir: str | None = None, trust_remote_code: bool = False
) -> ProcessorMixin:
    """Open the processor of a checkpoint.

    Raises:
        UserError: the folder holds no complete processor: tokenizer with the tokens of images and videos, image
            processor and video processor.
    """
    register_classes_of(model_name_or_path, cache_dir)
    try:
        processor = AutoProcessor.from_pretrained(
            model_name_or_path, cache_dir=cache_dir, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"transformers cannot open its processor ({_first_line(error)})"
        raise UserError(_incomplete(model_name_or_path, problem)) from error
    missing = [name for name in ("image_processor", "video_processor") if getattr(processor, name, None) is None]
    if missing:
        raise UserError(_incomplete(model_name_or_path, f"it has no {' and no '.join(missing)}"))
    for token in (processor.image_token, processor.video_token):
        tokenizer = processor.tokenizer
        if tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(token)) != token:
            raise UserError(_incomplete(model_name_or_path, f"its tokenizer is missing, or does not know {token}"))
    return processor


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """Ids of the tokens of ``--additional_tokens``.

    Args:
        ids: Ids of all these tokens.
        new: Ids of the tokens that the tokenizer did not know; they follow all other ids.
    """

    ids: tuple[int, ...] = ()
    new: tuple[int, ...] = ()


def add_tokens(processor: Any, tokens: Sequence[str]) -> AddedTokens:
    """Add texts as tokens to a processor's tokenizer; texts that are tokens already stay as they are.

    Args:
        processor: Processor, changed in place.
        tokens: Texts that become one token each.

    Raises:
        UserError: a text is empty, begins or ends with white space, or comes twice.
    """
    tokenizer = processor.tokenizer
    for token in tokens:
        if not token.strip() or token != token.strip():
            raise UserError(f"--additional_tokens {token!r}: a token is a text without white space at its ends.")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"--additional_tokens: {max(tokens, key=list(tokens).count)} is named twice.")
    known = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    return AddedTokens(ids, tuple(token_id for token_id in ids if token_id >= known))


def _incomplete(model_name_or_path: str, problem: str) -> str:
    return (
        f"--model_name_or_path {model_name_or_path}: {problem}. Copy the files of the original checkpoint's processor "
        "into the folder: tokenizer*, *processor_config.json and chat_template*."
    )


def vision_settings(
    family: Family,
    arguments: DataArguments,
    *,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    tokens_per_frame: int | None = None,
) -> VisionSettings:
    """Return the limits of a run: those of the flags, with the patch sizes of a checkpoint's processor."""
    return VisionSettings(
        family=family,
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=temporal_patch_size,
        image_min_pixels=arguments.min_pixels,
        image_max_pixels=arguments.max_pixels,
        video_min_pixels=arguments.video_min_pixels,
        video_max_pixels=arguments.video_max_pixels,
        video_min_frame_pixels=arguments.video_min_frame_pixels,
        video_max_frame_pixels=arguments.video_max_frame_pixels,
        video_fps=arguments.video_fps,
        video_min_frames=arguments.video_min_frames,
        video_max_frames=arguments.video_max_frames,
        tokens_per_frame=tokens_per_frame,
    )


def build_encoder(
    processor: Any,
    config: PretrainedConfig,
    family: Family,
    arguments: DataArguments,
    max_length: int,
    max_positions: int | None = None,
) -> SampleEncoder:
    """Return the encoder of this run's samples to model inputs.

    Args:
        processor: Processor of the checkpoint.
        config: Config of the model.
        family: Family of the model.
        arguments: Limits, template arguments and policies.
        max_length: Most tokens of a sample.
        max_positions: Most positions of a sample, None for any.

    Raises:
        UserError: processor and model do not belong together.
    """
    _require_same_pixels(processor, config.vision_config)
    settings = vision_settings(
        family,
        arguments,
        **{name: getattr(processor.image_processor, name) for name in _PATCH_SIZES},
        tokens_per_frame=getattr(config.vision_config, "tokens_per_frame", None),
    )
    speed = float(config.vision_config.tokens_per_second) if family.timed_positions else None
    vision = VisionTokens.from_processor(processor, speed)
    if (vision.image_id, vision.video_id) != (config.image_token_id, config.video_token_id):
        raise UserError(
            f"The tokenizer has {vision.image} and {vision.video} at {vision.image_id} and {vision.video_id}, but the "
            f"model's config.json expects {config.image_token_id} and {config.video_token_id}. {_FOREIGN}"
        )
    template_kwargs = dict(arguments.chat_template_kwargs or {})
    if arguments.add_vision_id:
        template_kwargs["add_vision_id"] = True
    return SampleEncoder(
        template=ChatTemplate(processor, template_kwargs),
        tokenizer=Tokenizer(processor.tokenizer, vision, settings),
        settings=settings,
        reserved_tokens=frozenset({vision.image, vision.video, vision.start, vision.end, _VISION_PAD}),
        max_length=max_length,
        max_positions=max_positions,
        overlength=arguments.overlength,
        allow_remote=arguments.allow_remote_media,
        video_timeout=arguments.video_timeout,
        history=arguments.history,
        loss_on=arguments.loss_on,
    )


def _require_same_pixels(processor: Any, vision_config: Any) -> None:
    """Check that the processor cuts patches of the size that the vision tower takes, and resizes as training does.

    Raises:
        UserError: a size or the resampling filter differs.
    """
    wanted = {
        "patch_size": vision_config.patch_size,
        "merge_size": vision_config.spatial_merge_size,
        "temporal_patch_size": vision_config.temporal_patch_size,
    }
    for part in ("image_processor", "video_processor"):
        for name, value in wanted.items():
            found = getattr(getattr(processor, part), name)
            if found != value:
                raise UserError(f"The {part} has {name} {found}, but the model's config.json {value}. {_FOREIGN}")
        resample = getattr(processor, part).resample
        if resample != PILImageResampling.BICUBIC:
            raise UserError(f"The {part} resizes with resample {resample}, but these models by bicubic (3). {_FOREIGN}")


def with_training_limits(processor: ProcessorMixin, settings: VisionSettings) -> ProcessorMixin:
    """Return a copy of the processor with the pixel and frame limits of training; all else stays the checkpoint's.

    Whether it samples frames by itself stays too: clients of Qwen2-VL and Qwen2.5-VL (vLLM, lmms-eval, qwen-vl-utils)
    give their processors frames that are sampled already.
    """
    limited: Any = copy.deepcopy(processor)
    limited.image_processor.size = {
        "shortest_edge": settings.image_min_pixels,
        "longest_edge": settings.image_max_pixels,
    }
    video = limited.video_processor
    video.fps = settings.video_fps
    video.min_frames = settings.video_min_frames
    video.max_frames = settings.video_max_frames
    low, high, cap_tokens = _video_limits(settings)
    video.size = {"shortest_edge": low, "longest_edge": high}
    video.cap_pixels_per_frame = cap_tokens is not None
    if cap_tokens is not None:
        video.max_video_tokens = cap_tokens
    return limited


def limits_as_flags(processor: Any, family: Family) -> dict[str, Any]:
    """Return the limits of a processor as training flags: for a trained folder, those it was trained with.

    A video processor without a rate, as in published checkpoints of Qwen2.5-VL, counts as 2 frames per second and 4 to
    768 frames: the defaults of qwen-vl-utils, with which these checkpoints are used.
    """
    video = processor.video_processor
    images, clips = _as_dict(processor.image_processor.size), _as_dict(video.size)
    flags: dict[str, Any] = {
        "min_pixels": images["shortest_edge"],
        "max_pixels": images["longest_edge"],
        "video_fps": float(video.fps) if video.fps else 2.0,
        "video_min_frames": (video.fps and video.min_frames) or 4,
        "video_max_frames": (video.fps and video.max_frames) or 768,
        "video_min_pixels": clips["shortest_edge"],
        "video_max_pixels": clips["longest_edge"],
    }
    if family.video_layout != "frames":  # size is that of a frame
        flags |= {"video_min_frame_pixels": clips["shortest_edge"], "video_max_frame_pixels": clips["longest_edge"]}
        flags["video_max_pixels"] = clips["longest_edge"] * flags["video_max_frames"]
        if getattr(video, "cap_pixels_per_frame", None):
            factor = video.patch_size * video.merge_size
            flags["video_max_pixels"] = 2 * int(0.9 * factor**2 * video.max_video_tokens)
    return flags


def processor_limits(processor: Any) -> dict[str, Any]:
    """Return the pixel and frame limits of a processor, for the record beside a checkpoint."""
    names = ("do_sample_frames", "fps", "min_frames", "max_frames", "cap_pixels_per_frame", "max_video_tokens")
    video = {name: getattr(processor.video_processor, name, None) for name in names}
    return {
        "image_processor": {"size": _as_dict(processor.image_processor.size)},
        "video_processor": {"size": _as_dict(processor.video_processor.size), **video},
    }


def describe_limits(settings: VisionSettings) -> dict[str, str]:
    """Return the limits of images and of videos in words."""
    low, high, token = settings.image_min_pixels, settings.image_max_pixels, settings.factor**2
    clip = f"{settings.video_min_pixels:,} to {settings.video_max_pixels:,} pixels per clip"
    frames = f"{settings.video_min_frames} to {settings.video_max_frames} frames at {settings.video_fps:g} per second"
    return {
        "images": f"{low:,} to {high:,} pixels ({low // token:,} to {high // token:,} tokens)",
        "videos": f"{clip}, {frames}",
    }


def _video_limits(settings: VisionSettings) -> tuple[int, int, float | None]:
    """Return (shortest_edge, longest_edge, max_video_tokens or None) that make a stock video processor resize alike."""
    clip_max, frame_max = settings.video_max_pixels, settings.video_max_frame_pixels
    if settings.family.video_layout == "frames":
        if frame_max is not None or settings.video_min_frame_pixels is not None:
            logger.warning(
                "The saved video processor cannot express limits of a single frame: at inference, pass "
                "frames of the size you trained on, or train with --video_max_pixels (the whole clip)."
            )
        return settings.video_min_pixels, clip_max, None
    # These processors limit a frame; their cap shares a clip's budget of 0.9 x tokens x 2 frames over its frames.
    tokens = (clip_max // 2 + 0.5) / (0.9 * settings.factor**2)
    return settings.frame_min_pixels, clip_max // 2 if frame_max is None else frame_max, tokens


def _as_dict(size: Any) -> dict[str, int]:
    return {key: value for key, value in dict(size).items() if value is not None}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
