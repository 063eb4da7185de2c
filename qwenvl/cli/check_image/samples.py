"""Finds all problems of a sample by the rules of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenvl.config import DataArguments
from qwenvl.data.conversation.boxes.write import write_boxes
from qwenvl.data.conversation.clip_limits import LIMIT_FIELDS
from qwenvl.data.conversation.media_items import media_keys
from qwenvl.data.conversation.messages import Examined, examine
from qwenvl.data.conversation.thoughts import is_empty_answer
from qwenvl.data.encoding.encoder import SampleEncoder, plan_item
from qwenvl.data.encoding.processor import vision_settings
from qwenvl.data.encoding.targets import TargetReader, require_no_weights
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.resize import ImagePlan, MediaPlan, VisionSettings
from qwenvl.data.sample_stats import REMARKS
from qwenvl.data.sources.record_forms import FORM_FIELDS
from qwenvl.data.types import Conversation, Sample
from qwenvl.families import get_family
from qwenvl.utils.errors import SampleError

DIGEST_BYTES = 16
# The keys that training uses; others, such as the id, may differ between samples of the same content.
CONTENT = (
    *("conversations", "messages", "image", "images", "video", "videos", "system", "tools"),
    *("bbox_format", "objects"),
)
TAGS = ("<image>", "<video>")
TAG_IN_ANSWER = "tag_in_answer"  # a problem only here: training accepts such samples
# For checks without a model: these tokens have the same names in all families, and the same images and videos are
# rejected for every family.
RESERVED_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
DEFAULT_FAMILY = "qwen3_vl"


def default_settings(arguments: DataArguments) -> VisionSettings:
    """Return the limits of the flags with the patch sizes of Qwen3-VL, for a check without a model."""
    family = get_family(DEFAULT_FAMILY)
    return vision_settings(family, arguments, patch_size=16, merge_size=2, temporal_patch_size=2)


@dataclass(frozen=True, slots=True)
class Finding:
    """Results of the check of a sample.

    Args:
        problems: Problems of the sample, each once.
        media: Number of its images and videos.
        unread_keys: Unused keys of the sample, as in :class:`qwenvl.data.types.Conversation`.
        remarks: Kinds of :data:`qwenvl.data.sample_stats.REMARKS` that apply to the sample.
    """

    problems: tuple[SampleError, ...]
    media: int
    unread_keys: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleChecker:
    """Finds the problems of samples. Can be sent to other processes.

    Args:
        settings: Limits of images and videos.
        reserved_tokens: Strings that no text may contain.
        allow_remote: Media may be fetched by http(s).
        decode: Decode media instead of reading only their headers.
        encoder: Encoder of the run, to render samples and count tokens; None to skip that.
        labels: Reader of a task's labels, to check them; None to skip that.
    """

    settings: VisionSettings
    reserved_tokens: Collection[str]
    allow_remote: bool
    decode: bool = False
    encoder: SampleEncoder | None = None
    labels: TargetReader | None = None

    def check_row(self, samples: Sequence[Sample]) -> list[Finding]:
        """Check the samples of a row, whose total length is limited."""
        used, findings = 0, list[Finding]()
        for sample in samples:
            finding = self._check(sample)
            if self.encoder is not None and all(one.category == TAG_IN_ANSWER for one in finding.problems):
                try:
                    measures = self.encoder.measure(sample)
                    self.encoder.require_length(measures.tokens, sample, used)
                    used += measures.tokens
                    finding = replace(finding, remarks=tuple(kind for kind in REMARKS if getattr(measures, kind)))
                    if self.labels is not None and self.labels.reads_plan:
                        for plan in self.encoder.plans(sample):
                            self.labels.read(sample, plan)
                except SampleError as error:
                    finding = replace(finding, problems=(*finding.problems, error))
            findings.append(finding)
        return findings

    def _check(self, sample: Sample) -> Finding:
        asked = self.labels is not None and self.labels.prompts
        fields = () if self.labels is None else self.labels.fields
        examined = examine(sample, self.reserved_tokens, answered=not asked, task_fields=fields)
        problems = [
            *examined.problems,
            *tags_in_answers(examined.conversation),
            *self._label_problems(sample, examined),
        ]
        reader = MediaReader(sample.data_path, self.allow_remote, sample.allow_absolute)
        plans, written = list[MediaPlan](), examined.conversation
        for item in examined.media:
            try:
                plans.append(plan_item(item, reader, self.settings))
                if self.decode:
                    _decode(plans[-1], reader)
            except SampleError as error:
                problems.append(error)
        unconverted = False
        if tuple(plan.item for plan in plans) == examined.conversation.media():
            try:
                written = write_boxes(examined.conversation, plans, sample, self.settings.family, problems)
                unconverted = not problems and written.unconverted
            except SampleError as error:
                problems.append(error)
        once = {(problem.category, problem.reason): problem for problem in problems}
        empty = not asked and any(map(is_empty_answer, examined.conversation.messages))
        remarks = ("empty_answers",) * empty + ("unconverted",) * unconverted  # the others need a template
        return Finding(tuple(once.values()), len(examined.media), examined.conversation.unread_keys, remarks)

    def _label_problems(self, sample: Sample, examined: Examined) -> Iterator[SampleError]:
        if self.labels is not None:
            try:
                require_no_weights(examined.conversation)
                self.labels.check(sample, examined.conversation)
            except SampleError as error:
                yield error


def tags_in_answers(conversation: Conversation) -> Iterator[SampleError]:
    """Yield a problem for every answer with a media tag, which training treats as plain text."""
    for message in conversation.messages:
        tags = [tag for tag in TAGS if tag in message.text] if message.role == "assistant" else []
        if tags:
            where = message.text.index(tags[0])
            near = message.text[max(where - 20, 0) : where + 40]
            yield SampleError(
                TAG_IN_ANSWER,
                f"an answer holds {' and '.join(tags)}, which shows nothing there and is learned as words: {near!r}. "
                "Move it to the question.",
            )


def content_digest(sample: Sample) -> bytes:
    """Return a hash of the content of a sample: equal if the turns and the names of media are the same."""
    record = sample.record
    media = (key for keys in media_keys(record).values() for key in keys)
    keys = {*CONTENT, *FORM_FIELDS, *LIMIT_FIELDS, *media}
    content = {key: record[key] for key in record if key in keys and record[key] is not None}
    try:
        text = _ENCODER.encode(content) if content else str(sample.origin)
    except (TypeError, ValueError, RecursionError):  # a record that is bad for this reason; its hash is unique
        text = str(sample.origin)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def _hashed(value: Any) -> Any:
    """Return a substitute for a value that JSON cannot hold: the hash of embedded images."""
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=DIGEST_BYTES).hexdigest()
    return dict(value) if isinstance(value, Mapping) else repr(value)


_ENCODER = json.JSONEncoder(sort_keys=True, default=_hashed)


def _decode(plan: MediaPlan, reader: MediaReader) -> None:
    """Decode an image, or the frames of a video that training would sample."""
    if isinstance(plan, ImagePlan):
        reader.read_pixels(plan.item)
    else:
        reader.read_frames(plan.item, plan.indices, lambda frames: frames[..., :1, :1])
