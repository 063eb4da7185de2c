"""Answer rows of datasets on any number of processes, and write each batch of answers as it is finished."""

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
from qwenvl.inference.generate import Answer, ChatModel, Decoding, generate
from qwenvl.inference.loss import example_loss, token_losses, weighted_sum
from qwenvl.inference.other_images import Key, View, blank, fitted, key_of
from qwenvl.inference.prompts import EvalExample, Prompt, open_example
from qwenvl.metrics.boxes import read_boxes
from qwenvl.metrics.predictions import EMBEDDED, Prediction, PredictionStore
from qwenvl.metrics.text import final_answer
from qwenvl.utils.cache import array_hash, fingerprint
from qwenvl.utils.distributed import from_main_process, rank, wait_for_all, world_size
from qwenvl.utils.errors import SampleError

Progress = Callable[[int], None]
"""Called with the number of rows that this process has just answered."""

Lines = Sequence[tuple[Prediction, EvalExample | None]]
"""Lines of some rows, each with its opened sample; None where it has a problem."""


@dataclass(frozen=True)
class Job:
    """Rows to answer, and the settings that their answers depend on.

    Args:
        model: Folder or name of the model.
        tables: Datasets with their rows.
        encoder: Encoder that opens samples.
        decoding: Decoding settings.
        batch_size: Prompts per batch of generation.
        seed: Seed of token sampling.
        with_loss: Whether to compute the loss of each sample too.
        view: Images that the samples show: their own, blank ones, or another sample's.
        partners: Key of the sample whose media each sample shows; empty unless the view is ``swapped``.
        server_model: Name of the model of a server that answers in place of the folder's own; empty for none.
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
    server_model: str = ""

    @property
    def num_rows(self) -> int:
        """Total number of rows of all datasets."""
        return sum(len(table.rows) for table in self.tables)

    def settings(self) -> dict[str, Any]:
        """Return the settings that answers depend on, as JSON values for the file beside them."""
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
            **({"server_model": self.server_model} if self.server_model else {}),
            **({"partners": fingerprint(sorted(self.partners.items(), key=str))} if self.partners else {}),
        }

    def row(self, index: int) -> tuple[SampledTable, int]:
        """Return the table of a row, and the number of the row in that table."""
        for table in self.tables:
            if index < len(table.rows):
                return table, int(table.rows[index])
            index -= len(table.rows)
        raise IndexError(index)


def _weights(folder: Path) -> str:
    """Return a hash of the names, sizes and times of a folder's weight files."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return fingerprint(*((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def answer_rows(
    job: Job,
    output: Path,
    open_model: Callable[[], Any],
    progress: Callable[[int], Progress],
    answering: Callable[..., None] | None = None,
) -> list[Prediction]:
    """Answer the rows that have no answer yet. Every process has to call it.

    Args:
        job: Rows and settings.
        output: File of the answers.
        open_model: Function that opens the model; called only where rows are left to answer.
        progress: Function of the number of rows to answer in this process, which returns a :data:`Progress`.
        answering: Function that answers rows, with the arguments of :func:`answer`, which is the default.

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
    chat_model: ChatModel,
    write: Callable[[Iterable[Prediction]], None],
    told: Progress = lambda _: None,
) -> None:
    """Answer rows batch by batch.

    Args:
        job: Rows and settings.
        indices: Numbers of the rows.
        chat_model: Model and processor.
        write: Function called with the lines of each batch.
        told: Function called with the number of rows of each batch.
    """

    def respond(first: int, lines: Lines) -> list[Prediction]:
        prompts = [example.prompt for _, example in lines if example is not None]
        torch.manual_seed(job.seed + first)  # so that sampled tokens do not depend on earlier batches
        answers = iter(generate(chat_model, prompts, decoding=job.decoding, batch_size=job.batch_size))
        return [line if one is None else _answered(job, chat_model, line, one, next(answers)) for line, one in lines]

    _by_batch(job, indices, respond, write, told)


def measure(
    job: Job,
    indices: Sequence[int],
    chat_model: ChatModel,
    write: Callable[[Iterable[Prediction]], None],
    told: Progress = lambda _: None,
) -> None:
    """Compute the losses of rows batch by batch, and ask nothing; the arguments are those of :func:`answer`."""

    def respond(_: int, lines: Lines) -> list[Prediction]:
        examples = [example for _, example in lines if example is not None]
        losses = iter(token_losses(chat_model, examples) if examples else ())
        return [line if one is None else _measured(line, one, next(losses)) for line, one in lines]

    _by_batch(job, indices, respond, write, told)


def _by_batch(
    job: Job,
    indices: Sequence[int],
    respond: Callable[[int, Lines], list[Prediction]],
    write: Callable[[Iterable[Prediction]], None],
    told: Progress,
) -> None:
    """Open the rows batch by batch, and write what ``respond`` returns for the first row's number and the lines."""
    for start in range(0, len(indices), job.batch_size):
        chunk = indices[start : start + job.batch_size]
        write(respond(chunk[0], [_viewed(job, *line) for index in chunk for line in open_row(job, index)]))
        told(len(chunk))


def _measured(line: Prediction, example: EvalExample, losses: torch.Tensor) -> Prediction:
    loss, tokens = weighted_sum(losses, example)
    return replace(line, loss=loss, trained_tokens=tokens)


def _answered(job: Job, chat_model: ChatModel, line: Prediction, example: EvalExample, answer: Answer) -> Prediction:
    loss, tokens = example_loss(chat_model, example) if job.with_loss else (None, None)
    return replace(with_answer(line, answer), loss=loss, trained_tokens=tokens)


def with_answer(line: Prediction, answer: Answer) -> Prediction:
    """Return a line with its answer filled in."""
    thought = "unfinished" if answer.thinking else None
    return replace(line, prediction=answer.text, finish_reason=answer.finish_reason, thought=thought)


def _viewed(job: Job, line: Prediction, example: EvalExample | None) -> tuple[Prediction, EvalExample | None]:
    """Return a sample with the media of the job's view; with an error where it has no media to replace."""
    if example is None or job.view == "shown":
        return line, example
    frames = example.prompt.frames
    if not frames:
        return replace(line, error="no_media: the sample has no media to replace."), None
    if job.view == "blank":
        return line, example.showing(map(blank, frames))
    partner = job.partners.get(key_of(line))
    others = dict(_opened(job, partner[0])).get(partner) if partner is not None else None
    if others is None:
        return replace(line, error="no_partner: no other sample has media that could replace this sample's."), None
    return line, example.showing(exchanged(example.prompt, others.prompt))


def _opened(job: Job, index: int) -> Iterator[tuple[Key, EvalExample | None]]:
    return ((key_of(line), example) for line, example in open_row(job, index))


def exchanged(prompt: Prompt, other: Prompt) -> Iterator[torch.Tensor]:
    """Yield, for each medium of a prompt, one of the same kind from another prompt, resized; repeated if too few."""
    pairs = list(zip(other.plans, other.frames, strict=True))
    supply = {
        kind: itertools.cycle([frames for plan, frames in pairs if isinstance(plan, kind)])
        for kind in {type(plan) for plan in prompt.plans}
    }
    return (fitted(next(supply[type(plan)]), own) for plan, own in zip(prompt.plans, prompt.frames, strict=True))


def _canvas(example: EvalExample, settings: VisionSettings) -> tuple[int, int] | None:
    """Return (width, height) of the image in the units of its boxes; None unless one image and boxes are expected."""
    if len(example.prompt.plans) != 1 or not read_boxes(final_answer(example.expected)):
        return None
    height, width = example.prompt.plans[0].resized
    return (1000, 1000) if settings.family.boxes == "relative_1000" else (width, height)


def open_row(job: Job, index: int) -> Iterator[tuple[Prediction, EvalExample | None]]:
    """Yield the samples of a row: a line without an answer, and the example; None where it cannot be used."""
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
            example = open_example(sample, job.encoder)
        except SampleError as error:
            yield replace(named, error=f"{error.category}: {error.reason}"), None
        else:
            yield describe(named, sample, example, table.table.spec.options, job.encoder.settings), example


def describe(
    line: Prediction, sample: Sample, example: EvalExample, options: Mapping[str, Any], settings: VisionSettings
) -> Prediction:
    """Return a line with the fields of its sample that are known before it is answered.

    Args:
        line: Line with the sample's origin.
        sample: Sample with its record.
        example: Opened sample.
        options: Options of its dataset's registry entry.
        settings: Resizing settings of its media.
    """
    items = [plan.item for plan in example.prompt.plans]
    metric = sample.record.get("metric") or options.get("metric")
    answers = sample.record.get("answers")
    return replace(
        line,
        question=example.prompt.question,
        media=tuple((_kind(item), _where(item.source, sample.data_path)) for item in items),
        expected=example.expected,
        accepted=tuple(one for one in answers if isinstance(one, str)) if isinstance(answers, list) else (),
        metric=metric if isinstance(metric, str) else None,
        canvas=_canvas(example, settings),
    )


def _kind(item: ImageItem | VideoItem) -> str:
    return "image" if isinstance(item, ImageItem) else "video"


def _where(source: Source | tuple[Source, ...], data_path: str) -> Any:
    """Return an absolute path or URL; for embedded media, a name with a hash of the content."""
    if isinstance(source, tuple):
        return tuple(_where(frame, data_path) for frame in source)
    if isinstance(source, bytes) or source.startswith("data:"):
        return EMBEDDED + fingerprint(source if isinstance(source, str) else source.hex())
    return absolute_source(source, data_path)
