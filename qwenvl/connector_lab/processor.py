"""The connector lab's processor: Qwen2-VL's, with the connector's number of tokens per image."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLProcessor

MEDIA_TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
START, END = "<|vision_start|>", "<|vision_end|>"
"""Tokens around the media tokens, as in Qwen's vocabularies; they are added to other tokenizers."""

_PREAMBLE = """{%- set flattened = namespace(messages=[]) %}
{%- for message in messages %}
{%- if message.content is string or message.content is not defined or message.content is none %}
{%- set flattened.messages = flattened.messages + [message] %}
{%- else %}
{%- set text = namespace(value='') %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{%- set text.value = text.value + part.text %}
{%- else %}{%- set text.value = text.value + 'START' + ('IMAGE' if part.type == 'image' else 'VIDEO') + 'END' %}
{%- endif %}
{%- endfor %}
{%- set flattened.messages = flattened.messages + [dict(message, content=text.value)] %}
{%- endif %}
{%- endfor %}
{%- set messages = flattened.messages %}
"""


def with_images(chat_template: str) -> str:
    """Return a language model's chat template extended to images and videos as parts of a turn's content.

    They are written as tokens into the turn's text; the rest of the template is unchanged.
    """
    tokens = {"START": START, "END": END, "IMAGE": MEDIA_TOKENS["image"], "VIDEO": MEDIA_TOKENS["video"]}
    preamble = _PREAMBLE
    for name, token in tokens.items():
        preamble = preamble.replace(name, token)
    return preamble + chat_template


class LabProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor for any connector.

    Args:
        image_processor: Qwen2-VL's image processor, with the encoder's patch size, mean and standard deviation.
        tokenizer: Tokenizer of the language model, with the tokens of images and videos.
        video_processor: Qwen2-VL's video processor, with the same values.
        chat_template: Template from :func:`with_images`.
        tokens_per_frame: Tokens per image, and per temporal step of a video; None for one per merged patch.
        options: Keyword arguments of ``ProcessorMixin``.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        tokens_per_frame: int | None = None,
        **options: Any,
    ) -> None:
        self.tokens_per_frame = tokens_per_frame
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **options)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **options: Any) -> str:
        """Return the tokens of an image."""
        if self.tokens_per_frame is None:
            return str(super().replace_image_token(image_inputs, image_idx, **options))
        return str(self.image_token) * self.tokens_per_frame

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **options: Any) -> str:
        """Return the tokens of a video."""
        if self.tokens_per_frame is None:
            return str(super().replace_video_token(video_inputs, video_idx, **options))
        return str(self.video_token) * self.tokens_per_frame * int(video_inputs["video_grid_thw"][video_idx][0])
