"""One sample from its record to tokens and pixels: the stages of the data path in their order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from qwenvl.data.boxes import convert_boxes
from qwenvl.data.collation import EncodedSample, Event
from qwenvl.data.media import MediaReader
from qwenvl.data.messages import build_conversation
from qwenvl.data.pixels import read_resized
from qwenvl.data.rendering import ChatTemplate, Rendering
from qwenvl.data.sizes import ImagePlan, MediaPlan, VisionSettings, plan_image, plan_video
from qwenvl.data.tokenization import Tokenizer, Tokens
from qwenvl.data.types import Conversation, ImageItem, Sample
from qwenvl.utilities.errors import SampleError

Overlength = Literal["drop", "error", "truncate_turns"]


class OverlengthError(SampleError):
    """A sample longer than ``--model_max_length``."""

    def __init__(self, category: str, reason: str, origin: Any = None, fatal: bool = False) -> None:
        super().__init__(category, reason, origin)
        self.fatal = fatal


@dataclass(frozen=True, slots=True)
class Plan:
    """A sample before anything is decoded: exact tokens, from headers alone.

    Args:
        conversation: what is rendered, after turns were cut where the policy says so.
        rendering: the rendered text.
        media: what becomes of its pictures and videos, in token order.
        tokens: ids, labels and positions.
        events: what there is to report.
    """

    conversation: Conversation
    rendering: Rendering
    media: tuple[MediaPlan, ...]
    tokens: Tokens
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class SampleEncoder:
    """Everything that turns samples of one run into model inputs. Safe to send to DataLoader workers.

    Args:
        template: the checkpoint's chat template.
        tokenizer: rendering to tokens.
        settings: limits of pictures and videos.
        reserved_tokens: strings that no text may contain.
        max_length: most tokens a sample may have.
        overlength: what happens to longer ones: left out, stop the run, or leave out turns from the end.
        allow_remote: http(s) media may be fetched.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    settings: VisionSettings
    reserved_tokens: Collection[str]
    max_length: int
    overlength: Overlength = "drop"
    allow_remote: bool = False

    def plan(self, sample: Sample) -> Plan:
        """Tokenize without decoding media.

        Raises:
            SampleError: the sample cannot be used; says why, and where it stands.
        """
        try:
            conversation = build_conversation(sample, self.reserved_tokens)
            plan = self._plan(conversation, sample)
            if len(plan.tokens) > self.max_length:
                plan = self._shorten(plan, sample)
        except SampleError as error:
            error.origin = error.origin or sample.origin
            raise
        if self.template.thinking_mismatch(plan.conversation):
            event = Event("thinking_mismatch", sample.origin.dataset, str(sample.origin))
            plan = replace(plan, events=(*plan.events, event))
        return plan

    def encode(self, plan: Plan, sample: Sample) -> EncodedSample:
        """Decode the media of a planned sample.

        Raises:
            SampleError: a file cannot be decoded.
        """
        if not plan.media:
            return EncodedSample(plan.tokens)
        reader = self.reader(sample)
        try:
            frames = [read_resized(media, reader).flatten() for media in plan.media]
        except SampleError as error:
            error.origin = error.origin or sample.origin
            raise
        shapes = tuple((1 if isinstance(m, ImagePlan) else len(m.indices), *m.grid) for m in plan.media)
        return EncodedSample(plan.tokens, torch.cat(frames) if len(frames) > 1 else frames[0], shapes)

    def reader(self, sample: Sample) -> MediaReader:
        """Return what opens the media of a sample."""
        return MediaReader(sample.data_path, self.allow_remote, sample.allow_absolute)

    def _plan(self, conversation: Conversation, sample: Sample) -> Plan:
        reader = self.reader(sample)
        media = tuple(
            plan_image(item, reader.image_size(item), self.settings)
            if isinstance(item, ImageItem)
            else plan_video(item, reader.video_header(item), self.settings)
            for item in conversation.media()
        )
        conversation = convert_boxes(conversation, media, sample, self.settings.family)
        return self._tokenize(conversation, media)

    def _tokenize(self, conversation: Conversation, media: Sequence[MediaPlan]) -> Plan:
        rendering = self.template.render(conversation)
        return Plan(conversation, rendering, tuple(media), self.tokenizer(rendering, media))

    def _shorten(self, plan: Plan, sample: Sample) -> Plan:
        """Apply the over-length policy: turns go from the end, whole, and their media with them."""
        length = len(plan.tokens)
        if self.overlength == "truncate_turns":
            messages = plan.conversation.messages
            for stop in range(len(messages) - 1, 0, -1):
                if messages[stop - 1].role != "assistant":
                    continue
                shorter = replace(plan.conversation, messages=messages[:stop])
                cut = self._tokenize(shorter, plan.media[: len(shorter.media())])
                if len(cut.tokens) <= self.max_length:
                    message = f"{sample.origin}: {length} tokens; the last {len(messages) - stop} turns left out"
                    event = Event("truncated", sample.origin.dataset, message)
                    return replace(cut, events=(event,))
        raise OverlengthError(
            "overlength",
            f"the sample has {length} tokens, more than --model_max_length {self.max_length}. Raise it, lower "
            "--max_pixels or --video_max_pixels, or shorten the sample.",
            sample.origin,
            fatal=self.overlength == "error",
        )
