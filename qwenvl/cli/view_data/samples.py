"""One sample as the page shows it: the model's input, or the reason why it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwenvl.cli.view_data.answers import find_boxes
from qwenvl.cli.view_data.images import ImageFiles, medium_record
from qwenvl.cli.view_data.pieces import pieces_of
from qwenvl.data.conversation.chat_template import weight_lines
from qwenvl.data.encoding.encoded import EncodedSample, Plan
from qwenvl.data.encoding.encoder import OverlengthError, SampleEncoder
from qwenvl.data.encoding.tokenization import IGNORE_INDEX
from qwenvl.data.media.resize import ImagePlan, VideoPlan
from qwenvl.data.types import Sample
from qwenvl.utils.errors import Origin, SampleError

UNLIMITED = 1 << 30
"""Tokens; no sample has more."""

LONGEST_RAW = 4000
"""Most characters shown of the record of a bad sample."""

_KINDS = {"truncated": "truncated_turns"}  # "truncated" is the category of cut files

KINDS = ("text", "image", "images", "video", "mixed")


@dataclass(frozen=True, slots=True)
class Look:
    """A sample before its media are decoded.

    Args:
        origin: Dataset, file and line of the sample.
        sample: Sample; None if the row cannot be read.
        plan: Plan of the training row, also of one that is too long; None if it has another problem.
        problems: (category, reason) of each problem.
        row: Number of the training row, from 1.
        rows: Training rows of the sample.
    """

    origin: Origin
    sample: Sample | None
    plan: Plan | None
    problems: tuple[tuple[str, str], ...] = ()
    row: int = 1
    rows: int = 1


def look_at(sample: Sample, encoder: SampleEncoder) -> list[Look]:
    """Plan the training rows of a sample and find its problems, without decoding media."""
    try:
        plans = encoder.plans(sample)
    except OverlengthError as error:
        problem = (error.category, error.reason)
        try:
            plans = replace(encoder, max_length=UNLIMITED, max_positions=None).plans(sample)
        except SampleError as other:
            return [Look(sample.origin, sample, None, (problem, (other.category, other.reason)))]
        return _rows(sample, plans, (problem,))
    except SampleError as error:
        return [Look(sample.origin, sample, None, ((error.category, error.reason),))]
    problems = tuple((_KINDS.get(event.kind, event.kind), _reason(event.message, sample)) for event in plans[0].events)
    return _rows(sample, plans, problems)


def _rows(sample: Sample, plans: Sequence[Plan], problems: tuple[tuple[str, str], ...]) -> list[Look]:
    count = len(plans)
    return [Look(sample.origin, sample, plan, problems, row, count) for row, plan in enumerate(plans, start=1)]


def _reason(message: str, sample: Sample) -> str:
    """Return the message of an event without the place, which the page shows anyway."""
    reason = message.removeprefix(str(sample.origin)).removeprefix(": ")
    return reason or "the last answer has thinking that the template does not open, or lacks thinking that it opens."


def kind_of(plan: Plan | None) -> str:
    """Return the kind of media of a sample, one of :data:`KINDS`; "text" if it is unknown."""
    media = () if plan is None else plan.media
    videos = sum(isinstance(medium, VideoPlan) for medium in media)
    images = sum(isinstance(medium, ImagePlan) for medium in media)
    if videos and images:
        return "mixed"
    if videos:
        return "video"
    return "images" if images > 1 else "image" if images else "text"


@dataclass(frozen=True)
class Presenter:
    """Makes the records that the page reads.

    Args:
        encoder: Encoder of the run.
        tokenizer: Tokenizer of the checkpoint.
        files: Writer of the images.
    """

    encoder: SampleEncoder
    tokenizer: Any
    files: ImageFiles

    def record(self, look: Look) -> dict[str, Any]:
        """Return the record of a training row, and write its images."""
        problems, encoded = list(look.problems), None
        if look.plan is not None and look.sample is not None:
            try:
                (encoded,) = self.encoder.encode([look.plan], look.sample)
            except SampleError as error:
                problems.append((error.category, error.reason))
        origin = look.origin
        member = "" if origin.member is None else f", member {origin.member}"
        member += f", training row {look.row} of {look.rows}" if look.rows > 1 else ""
        record: dict[str, Any] = {
            "dataset": origin.dataset,
            "place": f"{origin.file}:{origin.line}{member}",
            "id": origin.id,
            "row": look.row,
            "kind": kind_of(look.plan),
            "problems": [list(one) for one in dict.fromkeys(problems)],
        }
        if look.plan is None:
            raw = _raw(look.sample)
            return {**record, "tokens": 0, "raw": raw, "text": f"{origin.id or ''} {raw}"}
        return {**record, **self._contents(look.plan, encoded), "text": f"{origin.id or ''} {look.plan.rendering.text}"}

    def _contents(self, plan: Plan, encoded: EncodedSample | None) -> dict[str, Any]:
        boxes = find_boxes(plan, self.encoder.settings.family)
        media = []
        for place, medium_plan in enumerate(plan.media):
            medium = None if encoded is None else encoded.media[place]
            media.append({**medium_record(medium_plan, medium, self.files), "boxes": boxes.drawn[place]})
        return {
            "tokens": len(plan.tokens),
            "trained": int((plan.tokens.labels != IGNORE_INDEX).sum()),
            "vision": int(plan.tokens.vision_mask.sum()),
            "turns": len(plan.conversation.messages),
            "weights": weight_lines(plan.rendering),
            "runs": pieces_of(plan.tokens, self.tokenizer),
            "media": media,
            "boxes_left": boxes.left,
        }


def _raw(sample: Sample | None) -> str:
    if sample is None:
        return ""
    try:
        text = json.dumps(dict(sample.record), ensure_ascii=False, indent=1, default=_named)
    except (TypeError, ValueError, RecursionError):  # a record that is bad for this reason
        text = repr(sample.record)
    return text if len(text) <= LONGEST_RAW else f"{text[:LONGEST_RAW]} ..."


def _named(value: Any) -> str:
    return f"({len(value)} bytes)" if isinstance(value, bytes) else repr(value)
