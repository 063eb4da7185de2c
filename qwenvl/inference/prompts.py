"""Prompts: turns up to a question, with images and videos decoded as in training.

Media pass through the encoder of training: the same size limits, the same frames of a video, the same pixels. So
generation and loss have exactly the input of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qwenvl.data.conversation.chat_template import ChatTemplate
from qwenvl.data.encoding.encoded import EncodedSample, Medium, Plan
from qwenvl.data.encoding.encoder import SampleEncoder, plan_item
from qwenvl.data.media.pixels import read_resized
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.resize import MediaPlan, VisionSettings
from qwenvl.data.types import Message, Sample, TextPart
from qwenvl.utils.errors import SampleError


@dataclass(frozen=True)
class Prompt:
    """A prompt with decoded media.

    Args:
        messages: Turns up to the question.
        plans: Sizes and sources of the images and videos of the turns, in order.
        frames: Pixels of the media, in the same order: uint8 [frames, height, width, 3], RGB; an image is one frame.
        tools: Tools that the model may call.
        arguments: Template arguments of the answer, which override those of the run.
    """

    messages: tuple[Message, ...]
    plans: tuple[MediaPlan, ...] = ()
    frames: tuple[torch.Tensor, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """Text of the last turn."""
        return self.messages[-1].text


@dataclass(frozen=True)
class EvalExample:
    """An evaluation example: a sample split into its prompt and the expected answer.

    Args:
        prompt: Prompt before the last answer.
        expected: The last answer, with boxes in the format of the model's family.
        encoded: The whole sample, encoded as for training.
        sample: The sample itself.
    """

    prompt: Prompt
    expected: str
    encoded: EncodedSample
    sample: Sample

    def showing(self, frames: Iterable[torch.Tensor]) -> EvalExample:
        """Return the example with other pixels in its media, of the same number of frames and the same sizes."""
        shown = tuple(frames)
        media = tuple(Medium(new, old.grid) for new, old in zip(shown, self.encoded.media, strict=True))
        assert all(new.shape == old.shape for new, old in zip(shown, self.prompt.frames, strict=True))
        return replace(self, prompt=replace(self.prompt, frames=shown), encoded=replace(self.encoded, media=media))


def open_example(sample: Sample, encoder: SampleEncoder) -> EvalExample:
    """Split a sample into prompt and answer, and decode its media.

    With an encoder that reads the labels of a task, the sample is the prompt and its label the expected answer.

    Raises:
        SampleError: the sample cannot be used, or does not end in an answer to a question.
    """
    reader = encoder.reader(sample, keep_images=True)
    plan = encoder.plans(sample, reader, asked=True)[-1]
    if encoder.targets is not None:
        return _open_labelled(sample, encoder, plan, reader)
    messages = plan.conversation.messages
    if messages[-1].role != "assistant" or len(messages) < 2:
        raise SampleError("no_answer", "the sample does not end in an answer to a question.", sample.origin)
    (encoded,) = encoder.encode([plan], sample, reader)
    frames = tuple(medium.frames for medium in encoded.media)
    before = encoder.template.with_thoughts_apart(plan.conversation).messages[:-1]
    prompt = Prompt(before, plan.media, frames, plan.conversation.tools, plan.rendering.arguments[-1])
    return EvalExample(prompt, _expected(plan, encoder.template), encoded, sample)


def _expected(plan: Plan, template: ChatTemplate) -> str:
    """Return the last answer; with tool calls, as the template writes it."""
    answer = plan.conversation.messages[-1]
    if not answer.extra.get("tool_calls"):
        return answer.text.strip()
    start, stop = plan.rendering.spans[-1]
    return plan.rendering.text[start:stop].removesuffix(template.turn_end).strip()


def _open_labelled(sample: Sample, encoder: SampleEncoder, plan: Plan, reader: MediaReader) -> EvalExample:
    (encoded,) = encoder.encode([plan], sample, reader)
    frames = tuple(medium.frames for medium in encoded.media)
    prompt = Prompt(plan.conversation.messages, plan.media, frames, plan.conversation.tools)
    return EvalExample(prompt, label_text(sample.record.get("label")), encoded, sample)


def label_text(value: Any) -> str:
    """Return a label as text for predictions: a name unchanged, anything else as JSON; empty for None."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def open_prompt(messages: Iterable[Message], reader: MediaReader, settings: VisionSettings) -> Prompt:
    """Decode the media of turns that do not come from a dataset.

    Raises:
        SampleError: an image or video cannot be used.
    """
    turns = tuple(messages)
    items = [part for message in turns for part in message.parts if not isinstance(part, TextPart)]
    plans = tuple(plan_item(item, reader, settings) for item in items)
    return Prompt(turns, plans, tuple(read_resized(plan, reader) for plan in plans))
