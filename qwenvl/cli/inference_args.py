"""Flags of the tools that ask a model, and what these open."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from qwenvl.cli.data_args import ToolArguments, chosen_datasets
from qwenvl.config import DataArguments
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder, limits_as_flags, open_processor
from qwenvl.data.media.video.decode import prepare_backend
from qwenvl.families import get_family
from qwenvl.inference.batch import Job, Progress, answer_rows
from qwenvl.inference.generate import Answerer, Decoding, base_of, config_of, open_answerer, processor_folder
from qwenvl.metrics.predictions import Prediction
from qwenvl.models.loading import read_model_type
from qwenvl.models.rope_scaling import context_length
from qwenvl.tasks.files import read_record
from qwenvl.tasks.registry import saved_predictor
from qwenvl.utils.distributed import is_main_process
from qwenvl.utils.errors import UserError

ANY_LENGTH = 1 << 30
_LIMIT = {"help": "As in training. Default: what the model's own processor says."}


@dataclass
class AskArguments(ToolArguments):
    """Flags of the tools that ask a model, besides those of all tools. Limits of media are the model's own."""

    max_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    min_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_max_frames: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_min_frames: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_max_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_min_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_fps: float | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(
        default=0.0,
        metadata={"help": "0: the likeliest token each time. Above: tokens are drawn, 1 as the model says."},
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Draw among the likeliest tokens that have this probability together, 0 to 1."}
    )
    seed: int = field(default=0, metadata={"help": "Of tokens that are drawn."})
    batch_size: int = field(default=16, metadata={"help": "Samples answered at once by each process."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda:1, ... Default: a GPU if there is one."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Of the weights. auto: as they are saved."}
    )
    data_seed: int = field(default=0, metadata={"help": "Decides which rows name%%X takes; training's own default."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is missing: the folder of the model that is asked.")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise UserError("--max_new_tokens and --batch_size must be 1 or more.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be 0 or more, and --top_p above 0 and up to 1.")
        if self.top_p < 1 and not self.temperature:
            raise UserError("--top_p has no effect without --temperature above 0: the likeliest token is taken.")

    @property
    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        return Decoding(self.max_new_tokens, float(self.temperature), float(self.top_p))


def open_asking_encoder(arguments: AskArguments) -> SampleEncoder:
    """Return what opens samples and media for a model, with its own limits where no flag says others.

    Raises:
        UserError: the folder has no config or processor that can be used.
    """
    folder, base = arguments.model_name_or_path, arguments.base
    family = get_family(read_model_type(base_of(folder, base)))
    processor: Any = open_processor(processor_folder(folder, base))
    config = config_of(folder, base)
    own = limits_as_flags(processor, family)
    missing = {name: value for name, value in own.items() if getattr(arguments, name) is None}
    values = {one.name: getattr(arguments, one.name) for one in fields(DataArguments)} | missing
    prepare_backend()
    encoder = build_encoder(processor, config, family, DataArguments(**values), ANY_LENGTH, context_length(config))
    predictor = saved_predictor(folder)
    return encoder if predictor is None else replace(encoder, targets=predictor.reader(read_record(folder)))


def open_job(arguments: AskArguments) -> Job:
    """Open the datasets that the flags name, and the encoder.

    Raises:
        UserError: data or model folder cannot be used.
    """
    tables = open_tables(chosen_datasets(arguments), arguments.data_seed, arguments.data_cache_dir)
    encoder = open_asking_encoder(arguments)
    return Job(arguments.model_name_or_path, tables, encoder, arguments.decoding, arguments.batch_size, arguments.seed)


def answer_all(arguments: AskArguments, job: Job, output: Path, what: str = "Answering") -> list[Prediction]:
    """Answer the rows of a job, or predict them as the task of the model does; every process has to call it.

    Raises:
        UserError: the model cannot be opened, or the output not be used.
    """
    predictor = saved_predictor(arguments.model_name_or_path)
    if predictor is None:
        return answer_rows(job, output, lambda: open_model(arguments, job.encoder), progress_bar(what))
    opened = partial(open_predictor, arguments, job.encoder)
    return answer_rows(job, output, opened, progress_bar(what), predictor.answer)


def open_predictor(arguments: AskArguments, encoder: SampleEncoder) -> Any:
    """Open the model of a task, to predict what an encoder has opened.

    Raises:
        UserError: it cannot be opened.
    """
    predictor = saved_predictor(arguments.model_name_or_path)
    assert predictor is not None, "a model that answers in words"
    return predictor.open(open_model(arguments, encoder), arguments.model_name_or_path)


def open_model(arguments: AskArguments, encoder: SampleEncoder) -> Answerer:
    """Open the model, to be asked what an encoder has opened.

    Raises:
        UserError: it cannot be opened.
    """
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    opened = open_answerer(arguments.model_name_or_path, base=arguments.base, device=arguments.device, dtype=dtype)
    return replace(opened, template_kwargs=encoder.template.kwargs)


def progress_bar(what: str) -> Callable[[int], Progress]:
    """Return what shows a bar on a terminal of process 0, and nothing elsewhere."""

    def start(total: int) -> Progress:
        shown = is_main_process() and sys.stderr.isatty()
        bar = tqdm(total=total, desc=what, unit=" rows", disable=not shown, leave=False)

        def told(rows: int) -> None:
            bar.update(rows)

        return told

    return start
