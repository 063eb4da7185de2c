"""Generate answers from a model folder with the stock classes of transformers, in left-padded batches.

This module is independent of training. Prompts are rendered by the folder's own chat template and processor; see
:mod:`qwenvl.inference.prompts` for their images and videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.video_utils import VideoMetadata

from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.encoding.processor import BARE_VIDEO, MARKED_VIDEO, open_processor
from qwenvl.data.media.resize import MediaPlan, VideoPlan
from qwenvl.data.types import Conversation
from qwenvl.inference.positions import clip_positions, needs_positions
from qwenvl.inference.prompts import Prompt
from qwenvl.models.adapter_merging import open_adapted
from qwenvl.models.loading import keep_float32, load_model
from qwenvl.models.lora.files import CONFIG_FILE, find_base, read_config
from qwenvl.models.precision import read_dtype
from qwenvl.models.quantization import is_fp8, quantization_method
from qwenvl.utils.distributed import local_rank
from qwenvl.utils.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """Decoding settings.

    Args:
        max_new_tokens: Maximum number of tokens of an answer; the folder's end-of-turn tokens end it earlier.
        temperature: Sampling temperature; 0 for greedy decoding.
        top_p: Probability mass of nucleus sampling.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``generate``, which override the sampling settings of the folder."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        neutral = {"temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": bool(drawn), **(drawn or neutral)}


@dataclass(frozen=True)
class ChatModel:
    """A model with the processor that renders its prompts.

    Args:
        model: Model on its device, in evaluation mode.
        processor: Processor of the same folder.
        template_kwargs: Additional arguments of the chat template.
    """

    model: Any
    processor: Any
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, with the checks of training."""
        return ChatTemplate(self.processor, self.template_kwargs)


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Args:
        text: Text of the answer, without special tokens.
        finish_reason: ``stop`` where the model ended it, ``length`` where ``max_new_tokens`` cut it.
        thinking: Whether it was cut inside the thought that the prompt had opened.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    thinking: bool = False


def base_of(folder: str, base: str | None = None) -> str:
    """Return the folder or name of the base model of an adapter folder; any other folder as it is.

    Args:
        folder: Model folder, adapter folder, or a Hugging Face id.
        base: Base model of the adapters, if it is not at the location in ``adapter_config.json``.

    Raises:
        UserError: ``adapter_config.json`` cannot be read or does not name a base, or the base is not there; or a base
            is given for a folder without adapters.
    """
    if (Path(folder) / CONFIG_FILE).is_file():
        return find_base(folder, base)
    if base is not None:
        raise UserError(f"--base {base} has no effect: {folder} holds no adapters. Leave it out.")
    return folder


def config_of(folder: str, base: str | None = None) -> PretrainedConfig:
    """Return the config of a model; for adapters, the config in their folder if there is one, else their base's.

    Args:
        folder: See :func:`base_of`.
        base: See :func:`base_of`.

    Raises:
        UserError: See :func:`base_of`.
    """
    below = base_of(folder, base)
    return AutoConfig.from_pretrained(folder) if below == folder else read_config(folder, below)


def processor_folder(folder: str, base: str | None = None) -> str:
    """Return the folder with the processor: the given one, or the base of an adapter folder without a processor."""
    has_own = any((Path(folder) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    return folder if has_own else base_of(folder, base)


def open_chat_model(
    folder: str, *, base: str | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> ChatModel:
    """Open a full model with the stock classes, or adapters on their base with PEFT.

    Args:
        folder: Model folder, adapter folder, or a Hugging Face id.
        base: See :func:`base_of`.
        device: Device such as ``cpu`` or ``cuda:1``; None for the accelerator if there is one.
        dtype: Dtype of the weights; None for the dtype that they are saved in.

    Raises:
        UserError: the folder cannot be opened.
    """
    device = device or default_device()
    below = base_of(folder, base)
    processor = open_processor(processor_folder(folder, base))
    try:
        model: Any = (
            _open_whole(folder, device, dtype)
            if below == folder
            else open_adapted(below, folder, dtype or read_dtype(below))
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:  # ImportError: the library of quantized weights is missing
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be opened as a model with its processor: {first_line}") from error
    return ChatModel(model.to(device).eval(), processor)


def _open_whole(folder: str, device: str, dtype: torch.dtype | None) -> Any:
    """Open a full model with the stock class; dequantize FP8 weights on a CPU, which has no FP8 matrix products."""
    own = AutoConfig.from_pretrained(folder).to_dict() if device.startswith("cpu") else {}
    if is_fp8(own):
        return load_model(folder, dtype=dtype or read_dtype(folder), attn_implementation="sdpa")
    if method := quantization_method(own):
        raise UserError(
            f"{folder}: its weights are quantized ({method}), which needs a GPU. Use the unquantized checkpoint, or a "
            "server such as vLLM."
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto")
    keep_float32(model, folder, {})
    return model


def generate(
    chat_model: ChatModel,
    prompts: Sequence[Prompt],
    *,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    **options: Any,
) -> list[Answer]:
    """Return the answer to every prompt, in order.

    Args:
        chat_model: Model and processor, from :func:`open_chat_model`.
        prompts: Prompts to answer.
        decoding: Decoding settings; None for greedy decoding of up to 128 tokens.
        batch_size: Prompts per batch.
        options: Additional arguments of ``generate``.

    Raises:
        SampleError: the chat template cannot write a prompt.
    """
    options = {**(decoding or Decoding()).options(), **options}
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        inputs = encode_prompts(chat_model, prompts[start : start + batch_size]).to(chat_model.model.device)
        with torch.no_grad():  # not inference_mode, whose tensors a model that trains afterwards cannot use
            output = chat_model.model.generate(**inputs, **options)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = chat_model.processor.batch_decode(
            new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ended = _ended(chat_model, new_tokens)
        answers += [_answer(chat_model, *pair) for pair in zip(texts, ended, strict=True)]
    return answers


def _ended(chat_model: ChatModel, new_tokens: torch.Tensor) -> list[bool]:
    """Return for each row of new tokens, [B, T], whether it contains an end-of-sequence token."""
    ends = chat_model.model.generation_config.eos_token_id
    if ends is None:
        return [False] * len(new_tokens)
    return torch.isin(new_tokens, torch.as_tensor(ends, device=new_tokens.device)).any(dim=1).tolist()


def _answer(chat_model: ChatModel, text: str, ended: bool) -> Answer:
    thinking = not ended and chat_model.template.opens_thinking and "</think>" not in text
    return Answer(text, "stop" if ended else "length", thinking)


def encode_prompts(chat_model: ChatModel, prompts: Sequence[Prompt], *, answered: bool = False) -> Any:
    """Render and tokenize prompts, and cut their media into patches.

    Args:
        chat_model: Model and processor.
        prompts: Prompts to encode.
        answered: Whether the prompts end in an answer, so that no generation prompt follows.

    Returns:
        ``BatchFeature`` with ``input_ids`` and ``attention_mask`` int64 [B, T], padded on the left, and the media's
        ``pixel_values``, ``image_grid_thw``, ``pixel_values_videos`` and ``video_grid_thw`` where there are any; with
        clips of Qwen2-VL and Qwen2.5-VL also ``position_ids`` int64 [4, B, T].
    """
    texts = [_render(chat_model, prompt, answered) for prompt in prompts]
    processor = chat_model.processor
    shown = [pair for prompt in prompts for pair in zip(prompt.plans, prompt.frames, strict=True)]
    media: dict[str, Any] = {}
    if images := [Image.fromarray(frames[0].numpy()) for plan, frames in shown if not isinstance(plan, VideoPlan)]:
        media |= {"images": images, "images_kwargs": {"do_resize": False}}  # they are resized already
    if videos := [(plan, frames) for plan, frames in shown if isinstance(plan, VideoPlan)]:
        media["videos"] = [frames.permute(0, 3, 1, 2) for _, frames in videos]
        # this option of resizing has no effect here, but transformers from 5.21 on warns where it is not set
        chosen = {"cap_pixels_per_frame": False} if hasattr(processor.video_processor, "cap_pixels_per_frame") else {}
        media["videos_kwargs"] = chosen | {
            "do_resize": False,
            "do_sample_frames": False,  # only the sampled ones were decoded
            "video_metadata": [_metadata(plan) for plan, _ in videos],
        }
    inputs = processor(text=texts, text_kwargs={"padding": True, "padding_side": "left"}, return_tensors="pt", **media)
    config = getattr(chat_model.model, "config", None)  # none where prompts alone are wanted
    if videos and config is not None and needs_positions(config):
        inputs["position_ids"] = clip_positions(config, inputs)
    return inputs


def _render(chat_model: ChatModel, prompt: Prompt, answered: bool) -> str:
    conversation = Conversation(prompt.messages, prompt.tools, template_kwargs=prompt.arguments)
    template = chat_model.template
    text = (template.render(conversation) if answered else template.render_prompt(conversation)).text
    by_frame = type(chat_model.processor).__name__.startswith("Qwen3")
    return text.replace(MARKED_VIDEO, BARE_VIDEO) if by_frame else text


def _metadata(plan: MediaPlan) -> VideoMetadata:
    """Return the metadata from which the processor writes timestamps: indices of the sampled frames, and the rate."""
    assert isinstance(plan, VideoPlan)
    metadata = VideoMetadata(
        total_num_frames=plan.num_frames,
        fps=plan.fps,
        height=plan.resized[0],
        width=plan.resized[1],
        duration=plan.num_frames / plan.fps,
    )
    # The processor divides indices by the rate, which gives the times of training even for a variable frame rate.
    metadata.frames_indices = plan.indices if plan.times is None else plan.times * plan.fps
    return metadata


def default_device() -> str:
    """Return the accelerator with the index of the local rank; ``cpu`` if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    return f"{accelerator.type}:{local_rank()}" if accelerator.type != "mps" else accelerator.type
