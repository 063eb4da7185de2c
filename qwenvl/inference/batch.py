"""Rows of datasets answered by any number of processes, each its share, in batches that are kept as they come."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.media.locate import absolute_source
from qwenvl.data.media.resize import VisionSettings
from qwenvl.data.types import ImageItem, Sample, Source, VideoItem
from qwenvl.inference.generate import Answer, Answerer, Decoding, generate
from qwenvl.inference.loss import exercise_loss
from qwenvl.inference.other_images import Key, View, blank, fitted, key_of
from qwenvl.inference.prompts import Exercise, Prompt, open_exercise
from qwenvl.metrics.boxes import read_boxes
from qwenvl.metrics.predictions import EMBEDDED, Prediction, PredictionStore
from qwenvl.metrics.text import final_answer
from qwenvl.utils.cache import array_hash, fingerprint
from qwenvl.utils.distributed import from_main_process, rank, wait_for_all, world_size
from qwenvl.utils.errors import SampleError

Progress = Callable[[int], None]
"""Called with how many rows this process has just answered."""


@dataclass(frozen=True)
class Job:
    """What is to be answered, and how.

    Args:
        model: folder of the model, part of what answers depend on.
        tables: the datasets and their rows.
        encoder: opens samples.
        decoding: how tokens are chosen.
        batch_size: prompts answered at once.
        seed: of drawn tokens.
        with_loss: compute the loss of each sample as well.
        view: what the samples show.
        partners: whose pictures each sample shows, where it shows those of others.
    """

    model: str
    tables: Sequence[SampledTable]
    encoder: SampleEncoder
    decoding: Decoding
    batch_size: int = 16
    seed: int = 0
    with_loss: bool = False
    view: View = "shown"
    partners: Mapping[Key, Key] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of all datasets together."""
        return sum(len(table.rows) for table in self.tables)

    def settings(self) -> dict[str, Any]:
        """Return what answers depend on, for the record beside them; one value changes when any of it does."""
        rows = [(table.table.fingerprint, array_hash(table.rows)) for table in self.tables]
        drawn = {"seed": self.seed} if self.decoding.temperature else {}
        return {
            "model": os.path.abspath(self.model) if os.path.exists(self.model) else self.model,
            "weights": _weights(Path(self.model)),
            "datasets": [table.table.spec.name for table in self.tables],
            "rows": fingerprint(*rows),
            "input": self.encoder.fingerprint(),
            **asdict(self.decoding),
            **drawn,
            **({"with_loss": True, "view": self.view} if self.with_loss else {}),
            **({"partners": fingerprint(sorted(self.partners.items(), key=str))} if self.partners else {}),
        }

    def row(self, index: int) -> tuple[SampledTable, int]:
        """Return the table of a row and its row there."""
        for table in self.tables:
            if index < len(table.rows):
                return table, int(table.rows[index])
            index -= len(table.rows)
        raise IndexError(index)


def _weights(folder: Path) -> str:
    """Return a hash that changes when the files of a folder's weights do: their names, sizes and times."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return fingerprint(*((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def answer_rows(
    job: Job,
    output: Path,
    open_model: Callable[[], Any],
    progress: Callable[[int], Progress],
    answering: Callable[..., None] | None = None,
) -> list[Prediction]:
    """Answer the rows that have no answer yet; every process has to call it.

    Args:
        job: what is to be answered.
        output: file of the answers.
        open_model: opens the model; called where something is to be answered.
        progress: called with the number of rows to answer here; see :data:`Progress`.
        answering: what answers rows by the model, with the arguments of :func:`answer`, the default.

    Returns:
        All answers in the order of the data.

    Raises:
        UserError: the output was made with other settings, or cannot be written.
    """
    store = PredictionStore(output, job.settings())
    done = from_main_process(store.begin)
    missing = [index for index in range(job.num_rows) if index not in done]
    mine = missing[rank() :: world_size()]
    if mine:
        (answering or answer)(job, mine, open_model(), store.writer(rank()), progress(len(mine)))
    wait_for_all()
    return from_main_process(store.join)


def answer(
    job: Job,
    indices: Sequence[int],
    answerer: Answerer,
    write: Callable[[Iterable[Prediction]], None],
    told: Progress = lambda _: None,
) -> None:
    """Answer rows a batch at a time.

    Args:
        job: what holds them.
        indices: which rows.
        answerer: the model.
        write: called with the lines of each batch.
        told: called with the number of rows of each batch.
    """
    for start in range(0, len(indices), job.batch_size):
        chunk = indices[start : start + job.batch_size]
        lines = [_viewed(job, *line) for index in chunk for line in open_row(job, index)]
        prompts = [exercise.prompt for _, exercise in lines if exercise is not None]
        torch.manual_seed(job.seed + chunk[0])  # what is drawn does not depend on what was answered before
        answers = iter(generate(answerer, prompts, decoding=job.decoding, batch_size=job.batch_size))
        write([line if one is None else _answered(job, answerer, line, one, next(answers)) for line, one in lines])
        told(len(chunk))


def _answered(job: Job, answerer: Answerer, line: Prediction, exercise: Exercise, answer: Answer) -> Prediction:
    loss, tokens = exercise_loss(answerer, exercise) if job.with_loss else (None, None)
    return replace(with_answer(line, answer), loss=loss, trained_tokens=tokens)


def with_answer(line: Prediction, answer: Answer) -> Prediction:
    """Return a line with an answer."""
    thought = "unfinished" if answer.thinking else None
    return replace(line, prediction=answer.text, finish_reason=answer.finish_reason, thought=thought)


def _viewed(job: Job, line: Prediction, exercise: Exercise | None) -> tuple[Prediction, Exercise | None]:
    """Let a sample show what the job's view says; without media to exchange, it is not asked."""
    if exercise is None or job.view == "shown":
        return line, exercise
    frames = exercise.prompt.frames
    if not frames:
        return replace(line, error="no_media: there is nothing in the sample to exchange."), None
    if job.view == "blank":
        return line, exercise.showing(map(blank, frames))
    partner = job.partners.get(key_of(line))
    others = dict(_opened(job, partner[0])).get(partner) if partner is not None else None
    if others is None:
        return replace(line, error="no_partner: no other sample has media to exchange for this one's."), None
    return line, exercise.showing(exchanged(exercise.prompt, others.prompt))


def _opened(job: Job, index: int) -> Iterator[tuple[Key, Exercise | None]]:
    return ((key_of(line), exercise) for line, exercise in open_row(job, index))


def exchanged(prompt: Prompt, other: Prompt) -> Iterator[torch.Tensor]:
    """Yield media of another prompt in the places, sizes and kinds of a prompt's own; repeated where it has fewer."""
    pairs = list(zip(other.plans, other.frames, strict=True))
    supply = {
        kind: itertools.cycle([frames for plan, frames in pairs if isinstance(plan, kind)])
        for kind in {type(plan) for plan in prompt.plans}
    }
    return (fitted(next(supply[type(plan)]), own) for plan, own in zip(prompt.plans, prompt.frames, strict=True))


def _canvas(exercise: Exercise, settings: VisionSettings) -> tuple[int, int] | None:
    """Return what boxes count, (width, height) of the picture, where there is one picture and boxes are expected."""
    if len(exercise.prompt.plans) != 1 or not read_boxes(final_answer(exercise.expected)):
        return None
    height, width = exercise.prompt.plans[0].resized
    return (1000, 1000) if settings.family.boxes == "relative_1000" else (width, height)


def open_row(job: Job, index: int) -> Iterator[tuple[Prediction, Exercise | None]]:
    """Yield the samples of a row: lines without an answer, and what is asked; None where a sample cannot be."""
    table, row = job.row(index)
    place = table.table.origin(row)
    line = Prediction(index, place.dataset, place.file, place.line)
    try:
        samples = table.table[row]
    except SampleError as error:
        yield replace(line, error=f"{error.category}: {error.reason}"), None
        return
    for sample in samples:
        named = replace(line, id=sample.origin.id, member=sample.origin.member, members=len(samples))
        try:
            exercise = open_exercise(sample, job.encoder)
        except SampleError as error:
            yield replace(named, error=f"{error.category}: {error.reason}"), None
        else:
            yield describe(named, sample, exercise, table.table.spec.options, job.encoder.settings), exercise


def describe(
    line: Prediction, sample: Sample, exercise: Exercise, options: Mapping[str, Any], settings: VisionSettings
) -> Prediction:
    """Return a line with what is known of its sample before it is answered.

    Args:
        line: where the sample stands.
        sample: its record.
        exercise: the sample, opened.
        options: of its dataset's registry entry.
        settings: how its media are resized.
    """
    items = [plan.item for plan in exercise.prompt.plans]
    metric = sample.record.get("metric") or options.get("metric")
    answers = sample.record.get("answers")
    return replace(
        line,
        question=exercise.prompt.question,
        media=tuple((_kind(item), _where(item.source, sample.data_path)) for item in items),
        expected=exercise.expected,
        accepted=tuple(one for one in answers if isinstance(one, str)) if isinstance(answers, list) else (),
        metric=metric if isinstance(metric, str) else None,
        canvas=_canvas(exercise, settings),
    )


def _kind(item: ImageItem | VideoItem) -> str:
    return "image" if isinstance(item, ImageItem) else "video"


def _where(source: Source | tuple[Source, ...], data_path: str) -> Any:
    """Return an absolute path or URL; for what carries itself, a name by its content."""
    if isinstance(source, tuple):
        return tuple(_where(frame, data_path) for frame in source)
    if isinstance(source, bytes) or source.startswith("data:"):
        return EMBEDDED + fingerprint(source if isinstance(source, str) else source.hex())
    return absolute_source(source, data_path)
