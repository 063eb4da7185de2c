"""Processor folders of the tiny checkpoints: the family's own classes, limits and pixel statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

Template = Literal["qwen2_vl", "instruct", "thinking"]
TEMPLATES: tuple[Template, ...] = ("qwen2_vl", "instruct", "thinking")

# Pixel statistics and limits of the families' published preprocessor_config.json and video_preprocessor_config.json.
CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF_STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
QWEN2_LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
QWEN3_IMAGE_LIMITS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
QWEN3_VIDEO_LIMITS = {"shortest_edge": 64 * 64, "longest_edge": 24576 * 32 * 32}


def default_template(family: str) -> Template:
    """Return the kind of chat template that the family's Instruct checkpoints carry."""
    if family.startswith("qwen2"):
        return "qwen2_vl"
    return "thinking" if family.startswith("qwen3_5") else "instruct"


def read_template(template: Template) -> str:
    """Return the Jinja source of a chat template of this package."""
    return (Path(__file__).parent / f"{template}.jinja").read_text(encoding="utf-8")


def build_processor(family: str, tokenizer: PreTrainedTokenizerBase, template: Template) -> ProcessorMixin:
    """Return the family's processor with ``tokenizer`` and a chat template of this package."""
    chat_template = read_template(template)
    tokenizer.chat_template = chat_template
    if family.startswith("qwen2"):
        sizes: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, **CLIP_STATISTICS}
        return (Qwen2VLProcessor if family == "qwen2_vl" else Qwen2_5_VLProcessor)(
            image_processor=Qwen2VLImageProcessor(size=QWEN2_LIMITS, **sizes),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(size=QWEN2_LIMITS, **sizes),
            chat_template=chat_template,
        )
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, **HALF_STATISTICS}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=QWEN3_IMAGE_LIMITS, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=QWEN3_VIDEO_LIMITS, **sizes),
        chat_template=chat_template,
    )
