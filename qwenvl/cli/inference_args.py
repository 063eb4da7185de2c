"""Flags of the tools that ask a model, and functions that open the model and data they name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from qwenvl.cli.data_args import TRAINING_ALONE, ToolArguments, chosen_datasets
from qwenvl.config import DataArguments
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder, limits_as_flags, open_processor
from qwenvl.data.media.video.decode import prepare_backend
from qwenvl.families import get_family
from qwenvl.inference.answer_rows import Job, Progress, answer_rows
from qwenvl.inference.generate import ChatModel, Decoding, base_of, config_of, open_chat_model, processor_folder
from qwenvl.metrics.predictions import Prediction
from qwenvl.models.loading import read_model_type
from qwenvl.models.rope_scaling import context_length
from qwenvl.serving.answers import answer_by_server
from qwenvl.serving.server import Server
from qwenvl.tasks.files import read_record
from qwenvl.tasks.registry import saved_predictor
from qwenvl.utils.distributed import is_main_process
from qwenvl.utils.errors import UserError

ANY_LENGTH = 1 << 30
NOT_ASKED = TRAINING_ALONE | {"additional_tokens", "overlength", "model_type"}
"""Flags that no tool reads which runs a model: its folder decides, and no sample is too long."""
_OF_THE_MODEL = (
    *("max_pixels", "min_pixels", "video_fps", "video_max_frames", "video_min_frames", "video_max_pixels"),
    *("video_min_pixels", "video_max_frame_pixels", "video_min_frame_pixels", "device", "dtype", "batch_size"),
)
_LIMIT = {"help": "As in training. Default: the value of the model's processor."}


@dataclass
class ModelArguments(ToolArguments):
    """Flags of the tools that run a model, besides those of all tools. Media limits default to the model's own."""

    max_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    min_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_max_frames: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_min_frames: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_max_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_min_pixels: int | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    video_fps: float | None = field(default=None, metadata=_LIMIT)  # type: ignore[assignment]
    batch_size: int = field(default=16, metadata={"help": "Samples of a batch of each process."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda:1, ... Default: a GPU if there is one."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Type of the weights. auto: as saved."}
    )
    data_seed: int = field(default=0, metadata={"help": "Seed of the rows that name%%X takes; default as in training."})


@dataclass
class AskArguments(ModelArguments):
    """Flags of the tools that ask a model, besides those of the tools that run one."""

    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(
        default=0.0,
        metadata={"help": "0: always the likeliest token. Above: sampling; 1 for the model's own probabilities."},
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample among the likeliest tokens up to this total probability, 0 to 1."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is missing: the folder of the model.")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise UserError("--max_new_tokens and --batch_size must be 1 or more.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be 0 or more, and --top_p above 0 and up to 1.")
        if self.top_p < 1 and not self.temperature:
            raise UserError("--top_p has no effect without --temperature above 0: the likeliest token is taken.")

    @property
    def decoding(self) -> Decoding:
        """Settings of greedy decoding or sampling."""
        return Decoding(self.max_new_tokens, float(self.temperature), float(self.top_p))


def open_asking_encoder(arguments: ModelArguments) -> SampleEncoder:
    """Return the encoder of samples for a model, with the model's own media limits unless flags override them.

    Raises:
        UserError: The folder has no usable config or processor.
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


@dataclass
class AnswerArguments(AskArguments):
    """Flags of the tools that write answers to datasets, which may be a running server's."""

    server: str | None = field(
        default=None,
        metadata={
            "help": "Address of a running OpenAI-compatible server (http://localhost:8000) that answers in place of "
            "model_name_or_path, the folder that it serves (scripts/serve.sh)."
        },
    )
    server_model: str | None = field(
        default=None, metadata={"help": "Name of the model there. Default: the only one, or the one of the folder."}
    )
    requests: int = field(default=16, metadata={"help": "Maximum number of concurrent requests to the server."})

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        if self.server is not None and (without := [name for name in _OF_THE_MODEL if name in changed]):
            raise UserError(
                f"--{without[0]} has no effect with --server: the server has limits, devices and batches of its own, "
                "from the arguments that scripts/serve.sh starts it with. Leave it out."
            )
        if self.requests < 1:
            raise UserError("--requests must be 1 or more.")
        if self.server is None and changed & {"server_model", "requests"}:
            raise UserError("--server_model and --requests are for a --server: name its address.")


def open_job(arguments: AnswerArguments) -> Job:
    """Open the datasets that the flags name, and the encoder.

    Raises:
        UserError: Data or model folder cannot be used.
    """
    tables = open_tables(chosen_datasets(arguments), arguments.data_seed, arguments.data_cache_dir)
    encoder = open_asking_encoder(arguments)
    return Job(arguments.model_name_or_path, tables, encoder, arguments.decoding, arguments.batch_size, arguments.seed)


def answer_all(arguments: AnswerArguments, job: Job, output: Path, what: str = "Answering") -> list[Prediction]:
    """Answer the rows of a job, or predict their labels if the model has a task; every process has to call it.

    Raises:
        UserError: The model cannot be opened, the server does not answer, or the output cannot be used.
    """
    predictor = saved_predictor(arguments.model_name_or_path)
    if arguments.server is not None:
        if predictor is not None:
            raise UserError("--server: a server gives words, and this model has the head of a task. Leave it out.")
        server = Server.at(arguments.server, arguments.server_model, arguments.model_name_or_path)
        asking = partial(answer_by_server, requests=arguments.requests)
        return answer_rows(replace(job, server_model=server.model), output, lambda: server, progress_bar(what), asking)
    if predictor is None:
        return answer_rows(job, output, lambda: open_model(arguments, job.encoder), progress_bar(what))
    opened = partial(open_predictor, arguments, job.encoder)
    return answer_rows(job, output, opened, progress_bar(what), predictor.answer)


def open_predictor(arguments: AskArguments, encoder: SampleEncoder) -> Any:
    """Open a model with a task, to predict the labels of encoded samples.

    Raises:
        UserError: It cannot be opened.
    """
    predictor = saved_predictor(arguments.model_name_or_path)
    assert predictor is not None, "a model that answers in words"
    return predictor.open(open_model(arguments, encoder), arguments.model_name_or_path)


def open_model(arguments: ModelArguments, encoder: SampleEncoder) -> ChatModel:
    """Open the model, to answer samples of an encoder.

    Raises:
        UserError: It cannot be opened.
    """
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    opened = open_chat_model(arguments.model_name_or_path, base=arguments.base, device=arguments.device, dtype=dtype)
    return replace(opened, template_kwargs=encoder.template.kwargs)


def progress_bar(what: str) -> Callable[[int], Progress]:
    """Return a function that starts a progress bar, which only process 0 shows, and only on a terminal."""

    def start(total: int) -> Progress:
        shown = is_main_process() and sys.stderr.isatty()
        bar = tqdm(total=total, desc=what, unit=" rows", disable=not shown, leave=False)

        def told(rows: int) -> None:
            bar.update(rows)

        return told

    return start
