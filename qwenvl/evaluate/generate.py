"""Answers of a model folder, through the stock classes of transformers, in batches that are padded on the left.

Nothing here knows of training. Prompts are rendered by the folder's own chat template and processor; see
:mod:`qwenvl.evaluate.prompts` for their pictures and videos.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.video_utils import VideoMetadata

from qwenvl.data.processor import open_processor
from qwenvl.data.sizes import MediaPlan, VideoPlan
from qwenvl.data.types import ImageItem, Message, TextPart, VideoItem
from qwenvl.evaluate.prompts import Prompt
from qwenvl.models.adapter_files import CONFIG_FILE, read_base, read_config
from qwenvl.models.merging import open_adapted
from qwenvl.models.precision import read_dtype
from qwenvl.utilities.distributed import local_rank
from qwenvl.utilities.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How tokens of an answer are chosen.

    Args:
        max_new_tokens: longest answer; the folder's end-of-turn tokens end it earlier.
        temperature: 0 for the likeliest token each time; above, tokens are drawn.
        top_p: drawn among the likeliest tokens that have this probability together.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``generate``; those that the folder's generation config has do not come in."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        neutral = {"temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": bool(drawn), **(drawn or neutral)}


@dataclass(frozen=True)
class Answerer:
    """A model with what renders its prompts.

    Args:
        model: on its device, in evaluation mode.
        processor: of the same folder.
        template_kwargs: further arguments of the chat template.
    """

    model: Any
    processor: Any
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def base_of(folder: str) -> str:
    """Return the folder or name of the base model of an adapter folder; any other folder as it is.

    Raises:
        UserError: ``adapter_config.json`` cannot be read, or does not name a base.
    """
    return read_base(folder) if (Path(folder) / CONFIG_FILE).is_file() else folder


def config_of(folder: str) -> PretrainedConfig:
    """Return the config of a model; of adapters, that of their folder, where it has one, or of their base.

    Raises:
        UserError: the base of adapters is not named.
    """
    base = base_of(folder)
    return AutoConfig.from_pretrained(folder) if base == folder else read_config(folder, base)


def processor_folder(folder: str) -> str:
    """Return where the processor is: an adapter folder may have none, and its base has one."""
    has_own = any((Path(folder) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    return folder if has_own else base_of(folder)


def open_answerer(folder: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> Answerer:
    """Open a folder of a whole model with the stock classes, or of adapters, on their base, with PEFT.

    Args:
        folder: model folder, adapter folder, or a Hugging Face id.
        device: such as ``cpu`` or ``cuda:1``; None for the accelerator where there is one.
        dtype: of the weights; None for the one they are saved in.

    Raises:
        UserError: the folder cannot be opened.
    """
    device = device or default_device()
    processor = open_processor(processor_folder(folder))
    base = base_of(folder)
    try:
        model: Any = (
            AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto")
            if base == folder
            else open_adapted(base, folder, dtype or read_dtype(base))
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be opened as a model with its processor: {first_line}") from error
    return Answerer(model.to(device).eval(), processor)


def generate(
    answerer: Answerer,
    prompts: Sequence[Prompt],
    *,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    **options: Any,
) -> list[str]:
    """Return the answer to every prompt, in order.

    Args:
        answerer: from :func:`open_answerer`.
        prompts: the questions.
        decoding: how tokens are chosen; None for the likeliest, up to 128.
        batch_size: prompts answered at once.
        options: further ones of ``generate``.
    """
    options = {**(decoding or Decoding()).options(), **options}
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = encode_prompts(answerer, prompts[start : start + batch_size]).to(answerer.model.device)
        with torch.no_grad():  # no inference tensors: a model in training has to go on
            output = answerer.model.generate(**inputs, **options)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += answerer.processor.batch_decode(
            new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return answers


def encode_prompts(answerer: Answerer, prompts: Sequence[Prompt], *, answered: bool = False) -> Any:
    """Render and tokenize prompts, and cut patches of their media.

    Args:
        answerer: whose processor does it.
        prompts: the questions.
        answered: they end in an answer, and the header of another one does not follow.

    Returns:
        ``BatchFeature`` with ``input_ids`` and ``attention_mask`` int64 [B, T], padded on the left, and the media's
        ``pixel_values``, ``image_grid_thw``, ``pixel_values_videos`` and ``video_grid_thw`` where there are any.
    """
    texts = [_render(answerer, prompt, answered) for prompt in prompts]
    processor = answerer.processor
    shown = [pair for prompt in prompts for pair in zip(prompt.plans, prompt.frames, strict=True)]
    media: dict[str, Any] = {}
    if images := [Image.fromarray(frames[0].numpy()) for plan, frames in shown if not isinstance(plan, VideoPlan)]:
        media |= {"images": images, "images_kwargs": {"do_resize": False}}  # they have their size
    if videos := [(plan, frames) for plan, frames in shown if isinstance(plan, VideoPlan)]:
        media["videos"] = [frames.permute(0, 3, 1, 2) for _, frames in videos]
        # a rule of resizing, which is done; transformers from 5.21 on would warn where nobody chooses
        chosen = {"cap_pixels_per_frame": False} if hasattr(processor.video_processor, "cap_pixels_per_frame") else {}
        media["videos_kwargs"] = chosen | {
            "do_resize": False,
            "do_sample_frames": False,  # only the sampled ones were decoded
            "video_metadata": [_metadata(plan) for plan, _ in videos],
        }
    return processor(text=texts, text_kwargs={"padding": True, "padding_side": "left"}, return_tensors="pt", **media)


def _render(answerer: Answerer, prompt: Prompt, answered: bool) -> str:
    text: str = answerer.processor.apply_chat_template(
        template_messages(prompt.messages),
        tools=[dict(tool) for tool in prompt.tools] or None,
        tokenize=False,
        add_generation_prompt=not answered,
        **answerer.template_kwargs,
    )
    return text


def template_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return turns in the form that chat templates take."""
    return [
        {"role": message.role, "content": [_template_part(part) for part in message.parts], **message.extra}
        for message in messages
    ]


def _template_part(part: TextPart | ImageItem | VideoItem) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, ImageItem) else "video"}


def _metadata(plan: MediaPlan) -> VideoMetadata:
    """Return what timestamps are written from: the sampled frames' places in the source, and its rate."""
    assert isinstance(plan, VideoPlan)
    metadata = VideoMetadata(
        total_num_frames=plan.num_frames,
        fps=plan.fps,
        height=plan.resized[0],
        width=plan.resized[1],
        duration=plan.num_frames / plan.fps,
    )
    # The processor divides them by the rate: that gives the times of training, also where they have no constant rate.
    metadata.frames_indices = plan.indices if plan.times is None else plan.times * plan.fps
    return metadata


def default_device() -> str:
    """Return the accelerator, of this process's own number where torchrun started several; else ``cpu``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    return f"{accelerator.type}:{local_rank()}" if accelerator.type != "mps" else accelerator.type
