"""Encode one sample from its record to tokens and pixels: the stages of the data path in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from qwenvl.data.conversation.boxes.write import NOTHING_CONVERTED, write_boxes
from qwenvl.data.conversation.chat_template import ChatTemplate, Rendering
from qwenvl.data.conversation.messages import build_conversation, examine
from qwenvl.data.conversation.thoughts import is_empty_answer
from qwenvl.data.encoding.encoded import EncodedSample, Event, Medium, Plan
from qwenvl.data.encoding.rows import training_rows
from qwenvl.data.encoding.targets import TargetReader, as_question, require_no_weights
from qwenvl.data.encoding.tokenization import Encoding, Tokenizer, Tokens
from qwenvl.data.media.pixels import read_resized
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.resize import MediaPlan, VisionSettings, plan_image, plan_video
from qwenvl.data.media.video.decode import backend_name
from qwenvl.data.sample_stats import NOTHING, Measures, measure_row
from qwenvl.data.types import Conversation, History, ImageItem, LossOn, Sample, VideoItem
from qwenvl.utils.cache import fingerprint
from qwenvl.utils.errors import SampleError

Overlength = Literal["drop", "error", "truncate_turns"]
_HISTORIES, _LOSSES = get_args(History), get_args(LossOn)


class OverlengthError(SampleError):
    """A sample longer than ``--model_max_length``."""

    def __init__(self, category: str, reason: str, origin: Any = None, fatal: bool = False) -> None:
        super().__init__(category, reason, origin)
        self.fatal = fatal


@dataclass(frozen=True, slots=True)
class _Row:
    """A training row up to its length: headers are read and text is tokenized, but no tensor is made."""

    rendering: Rendering
    media: tuple[MediaPlan, ...]
    encoding: Encoding


@dataclass(frozen=True, slots=True)
class _Draft:
    """A sample up to its length."""

    conversation: Conversation
    media: tuple[MediaPlan, ...]
    rows: tuple[_Row, ...]

    @property
    def length(self) -> int:
        """Tokens of all rows together."""
        return sum(row.encoding.length for row in self.rows)


def plan_item(item: ImageItem | VideoItem, reader: MediaReader, settings: VisionSettings) -> MediaPlan:
    """Return the plan of an image or video, from its header.

    Raises:
        SampleError: it cannot be opened, or the model cannot take it; the message names it, without the origin.
    """
    try:
        if isinstance(item, ImageItem):
            return plan_image(item, reader.image_size(item), settings)
        return plan_video(item, reader.video_header(item), settings)
    except SampleError as error:
        raise reader.named(error, item) from error.__cause__


def _unread_keys(conversation: Conversation, sample: Sample) -> tuple[Event, ...]:
    name = sample.origin.dataset
    return tuple(
        Event("unread_key", name, f"dataset {name!r}: nothing reads {key}") for key in conversation.unread_keys
    )


@dataclass(frozen=True)
class SampleEncoder:
    """Encoder of the samples of one run to model inputs. Safe to send to DataLoader workers.

    Args:
        template: Chat template of the checkpoint.
        tokenizer: Tokenizer of renderings.
        settings: Limits of images and videos.
        reserved_tokens: Strings that no text may contain.
        max_length: Most tokens of a sample.
        overlength: Policy for longer samples: leave them out, stop the run, or leave out turns from their end.
        allow_remote: Whether http(s) media may be fetched.
        video_timeout: Seconds that opening or decoding a video may take.
        max_positions: Positions in the model's context; None for any. An image has fewer positions than tokens.
        targets: Reader of the task's target of each sample; None for language modelling.
        history: Rows of a conversation: every answer after the prompt that a server sends for it (``exact``), only the
            row of the last answer (``last``), or the conversation as the template renders it (``as_rendered``).
        loss_on: Answers, or parts of them, that are trained.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    settings: VisionSettings
    reserved_tokens: Collection[str]
    max_length: int
    overlength: Overlength = "drop"
    allow_remote: bool = False
    video_timeout: float = 120.0
    max_positions: int | None = None
    targets: TargetReader | None = None
    history: History = "exact"
    loss_on: LossOn = "all"

    @property
    def prompts(self) -> bool:
        """Whether samples are rendered as questions, without the answer at their end."""
        return self.targets is not None and self.targets.prompts

    @property
    def task_fields(self) -> tuple[str, ...]:
        """Fields of a record that the task reads."""
        return () if self.targets is None else self.targets.fields

    def plans(self, sample: Sample, reader: MediaReader | None = None, *, asked: bool = False) -> tuple[Plan, ...]:
        """Tokenize without decoding media.

        Args:
            sample: Sample to tokenize.
            reader: Reader of its media; None for a new one (:meth:`reader`).
            asked: Whether the last answer is to be generated, even if the sample does not train it.

        Returns:
            Its training rows, at least one. The first one holds the events to report.

        Raises:
            SampleError: the sample cannot be used; the message says why, with its origin.
        """
        whole, kept = self._fit(sample, reader or self.reader(sample), asked)
        self.require_length(kept.length, sample)
        events = tuple(self._events(whole, kept, sample))
        plans = list[Plan]()
        for row in kept.rows:
            tokens = self.tokenizer.expand(row.encoding)
            self._require_positions(tokens, sample)
            plans.append(Plan(kept.conversation, row.rendering, row.media, tokens, () if plans else events))
        return tuple(plans)

    def _events(self, whole: _Draft, kept: _Draft, sample: Sample) -> Iterator[Event]:
        """Yield the events to report of a sample."""
        conversation, dataset = kept.conversation, sample.origin.dataset
        if kept is not whole:
            removed = len(whole.conversation.messages) - len(conversation.messages)
            message = f"{sample.origin}: {whole.length} tokens; the last {removed} turns left out"
            yield Event("truncated", dataset, message)
        for kind, words in self._remarks(kept, sample).items():
            yield Event(kind, dataset, f"{sample.origin}{words}")
        yield from _unread_keys(conversation, sample)

    def unread_keys(self, sample: Sample) -> tuple[Event, ...]:
        """Return events for the keys of a record that nothing reads, usable or not, without opening its media."""
        examined = examine(sample, self.reserved_tokens, task_fields=self.task_fields)
        return _unread_keys(examined.conversation, sample)

    def measure(self, sample: Sample) -> Measures:
        """Return the statistics of the rows that :meth:`plans` would return, without making them.

        A sample that stays longer than ``max_length`` is counted as it is and not left out here, so that the numbers
        hold for other limits too (unless turns are left out).

        Raises:
            SampleError: the sample cannot be used, whatever the limit.
        """
        _, kept = self._fit(sample, self.reader(sample))
        measures = NOTHING
        for row in kept.rows:
            measures = measures.plus(measure_row(row.encoding.length, row.encoding.trained, row.media))
        answers = [thinks for row in kept.rows for thinks in row.rendering.thinks]
        weighted = sum(weight != 1 for row in kept.rows for weight in row.rendering.weights)
        remarks = dict.fromkeys(self._remarks(kept, sample), 1)
        return measures._replace(samples=1, answers=len(answers), thoughts=sum(answers), weighted=weighted, **remarks)

    def _remarks(self, draft: _Draft, sample: Sample) -> dict[str, str]:
        """Return the kinds of :data:`~qwenvl.data.sample_stats.REMARKS` of a sample, each with its details in words."""
        if self.prompts:
            return {}
        conversation, whole = draft.conversation, self._options(sample)[0] == "as_rendered"
        found = {"thinking_mismatch": ""} if self.template.thinking_mismatch(conversation, whole) else {}
        if left_out := [number for row in draft.rows for number in row.rendering.thoughts_left_out]:
            numbers = ", ".join(map(str, left_out))
            found["thoughts_left_out"] = f": the chat template leaves out the thought of answer {numbers}"
        if any(map(is_empty_answer, conversation.messages)):
            found["empty_answers"] = ": an answer is empty, and trained as its end of turn"
        if conversation.unconverted:
            found["unconverted"] = f": {NOTHING_CONVERTED}"
        return found

    def require_length(self, tokens: int, sample: Sample, used: int = 0) -> None:
        """Check that a sample, with the samples before it in its packed row, is no longer than ``max_length``.

        Args:
            tokens: Length of the sample, in tokens.
            sample: Sample, for the message.
            used: Tokens of the samples before it in its packed row.

        Raises:
            OverlengthError: the sample or the row is longer.
        """
        if tokens > self.max_length:
            reason = (
                f"the sample has {tokens} tokens, more than --model_max_length {self.max_length}. Raise it, lower "
                "--max_pixels or --video_max_pixels, or shorten the sample."
            )
        elif used and used + tokens > self.max_length:
            reason = f"the packed row is longer than --model_max_length {self.max_length} with this sample."
        else:
            return
        raise OverlengthError("overlength", reason, sample.origin, fatal=self.overlength == "error")

    def _require_positions(self, tokens: Tokens, sample: Sample) -> None:
        """Check that the rotary positions of a sample lie in the context of the model."""
        used = int(tokens.position_ids[1:].max()) + 1
        if self.max_positions is not None and used > self.max_positions:
            raise SampleError(
                "beyond_context",
                f"the sample takes {used} positions, but the model is made for {self.max_positions} "
                "(max_position_embeddings of its config.json). Extend its context by --rope_scaling yarn "
                "--rope_factor NUMBER, shorten the sample, or lower --model_max_length, which leaves it out.",
                sample.origin,
            )

    def encode(
        self, plans: Sequence[Plan], sample: Sample, reader: MediaReader | None = None
    ) -> tuple[EncodedSample, ...]:
        """Decode the media of a planned sample, once for all of its rows.

        Args:
            plans: Training rows of the sample.
            sample: Sample to encode.
            reader: Reader that planned it, if that keeps the files that it read; None for a new one.

        Raises:
            SampleError: a file cannot be decoded, or the target of a task is wrong.
        """
        reader = reader or self.reader(sample)
        longest = max((plan.media for plan in plans), key=len)  # rows hold media from the first one on
        try:
            targets = [None if self.targets is None else self.targets.read(sample, plan) for plan in plans]
            media = tuple(Medium(read_resized(medium, reader), medium.grid) for medium in longest)
        except SampleError as error:
            error.origin = error.origin or sample.origin
            raise
        return tuple(
            EncodedSample(plan.tokens, media[: len(plan.media)], sample.origin, target)
            for plan, target in zip(plans, targets, strict=True)
        )

    def reader(self, sample: Sample, keep_images: bool = False) -> MediaReader:
        """Return a reader of the media of a sample; ``keep_images`` where they are planned and then decoded."""
        folder, anywhere = sample.data_path, sample.allow_absolute
        return MediaReader(folder, self.allow_remote, anywhere, keep_images, self.video_timeout)

    def fingerprint(self) -> str:
        """Return a hash of everything besides the samples that lengths depend on."""
        limit = self.max_length if self.overlength == "truncate_turns" else None  # otherwise it is applied afterwards
        settings = asdict(self.settings)
        del settings["family"]["layout"]  # it concerns the model alone
        return fingerprint(
            self.template.identity(),
            self.tokenizer.identity(),
            settings,
            sorted(self.reserved_tokens),
            self.allow_remote,
            limit,
            backend_name(),
            self.history,
            self.loss_on,
            *([] if self.targets is None else self.targets.identity()),
        )

    def _fit(self, sample: Sample, reader: MediaReader, asked: bool = False) -> tuple[_Draft, _Draft]:
        """Return the whole sample and the part that the over-length policy keeps, usually the same."""
        try:
            conversation = build_conversation(
                sample, self.reserved_tokens, answered=not self.prompts, task_fields=self.task_fields
            )
            if self.targets is not None:
                require_no_weights(conversation)
            if self.prompts:
                conversation = as_question(conversation)
            elif asked:
                *before, last = conversation.messages
                conversation = replace(conversation, messages=(*before, replace(last, weight=last.weight or 1.0)))
            if self.targets is not None:
                self.targets.check(sample, conversation)
            media = tuple(plan_item(item, reader, self.settings) for item in conversation.media())
            conversation = write_boxes(conversation, media, sample, self.settings.family)
            options = self._options(sample)
            whole = self._tokenize(conversation, media, *options)
            if whole.length <= self.max_length or self.overlength != "truncate_turns":
                return whole, whole
            return whole, self._without_last_turns(whole, *options) or whole
        except SampleError as error:
            error.origin = error.origin or sample.origin
            raise

    def _options(self, sample: Sample) -> tuple[History, LossOn]:
        """Return history and loss of a sample: its own, else those of its dataset, else those of the run.

        Tasks read the conversation as a whole, and their targets beside it.
        """
        if self.targets is not None:
            return "as_rendered", "all"
        history = _chosen("history", sample.setting("history"), self.history, _HISTORIES)
        loss_on = _chosen("loss_on", sample.setting("loss_on"), self.loss_on, _LOSSES)
        if history == "as_rendered" and loss_on != "all":
            raise SampleError(
                "bad_record",
                f"'loss_on' is {loss_on!r}, but its conversation is trained as rendered, with all of its answers. "
                "Remove one of the two settings.",
            )
        return history, loss_on

    def _tokenize(
        self, conversation: Conversation, media: tuple[MediaPlan, ...], history: History, loss_on: LossOn
    ) -> _Draft:
        rows = []
        for rendering in self._renderings(conversation, history, loss_on):
            whole = self.prompts or history == "as_rendered"
            messages = conversation.messages if whole else conversation.messages[: rendering.turns[-1] + 1]
            used = media[: len(Conversation(messages).media())]
            encoding = self.tokenizer.encode(rendering, used, answered=not self.prompts)
            rows.append(_Row(rendering, used, encoding))
        return _Draft(conversation, media, tuple(rows))

    def _renderings(self, conversation: Conversation, history: History, loss_on: LossOn) -> Sequence[Rendering]:
        if self.prompts:
            return [self.template.render_prompt(conversation)]
        if history == "as_rendered":
            return [self.template.render(conversation)]
        turns = self.template.trained_turns(conversation)
        return training_rows(turns, self.template.header, self.tokenizer.same_ids, history, loss_on)

    def _without_last_turns(self, draft: _Draft, history: History, loss_on: LossOn) -> _Draft | None:
        """Leave out whole turns with their media from the end until the rest fits; None if nothing fits."""
        messages = draft.conversation.messages
        for stop in range(len(messages) - 1, 0, -1):
            if messages[stop - 1].role != "assistant" or not messages[stop - 1].trained:
                continue
            shorter = replace(draft.conversation, messages=messages[:stop])
            cut = self._tokenize(shorter, draft.media[: len(shorter.media())], history, loss_on)
            if cut.length <= self.max_length:
                return cut
        return None


def _chosen(key: str, value: Any, default: Any, known: Sequence[str]) -> Any:
    if value is None or value in known:
        return default if value is None else value
    raise SampleError("bad_record", f"{key!r} is {value!r}, not one of {', '.join(known)}.")
