"""The tasks by their names (``--task``): a line for each, and what the trainer and the commands ask of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from qwenvl.config import ParsedArguments, TaskArguments
from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.targets import TargetReader
from qwenvl.tasks.files import RECORD_FILE, is_task_folder, read_record
from qwenvl.tasks.grounding import objective as grounding
from qwenvl.tasks.grounding import predict as grounding_predict
from qwenvl.tasks.heads import build as heads
from qwenvl.tasks.heads import labelling
from qwenvl.tasks.heads import predict as heads_predict
from qwenvl.tasks.objective import Task
from qwenvl.utils.errors import UserError


@dataclass(frozen=True)
class Predictor:
    """How a saved model of a task predicts, where it does not answer in words.

    Args:
        reader: Function of ``task.json``: reader of the samples to predict.
        open: Function of an open model and its folder: model with the module of the task.
        answer: Function that predicts rows, with the arguments of :func:`qwenvl.inference.batch.answer`.
        scores: Function of folder, stock model and a sample's inputs: what ``Objective.scores`` gave, computed again.
    """

    reader: Callable[[Mapping[str, Any]], TargetReader]
    open: Callable[[Any, str], Any]
    answer: Callable[..., None]
    scores: Callable[[str, Any, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class TaskKind:
    """What there is to ask of a task by its name.

    Args:
        open: Function of settings, config, training and evaluation datasets, and encoder: task of a run.
        reader: Function of flags and encoder, or None without a model: reader for ``tools/check_image.py``.
        usage: Python lines for the model card that open a saved folder ``{name}``; None for those of the model alone.
        predictor: How a saved model predicts; None where it answers in words, as without a task.
    """

    open: Callable[
        [ParsedArguments, PretrainedConfig, Sequence[SampledTable], Sequence[SampledTable], SampleEncoder], Task
    ]
    reader: Callable[[TaskArguments, SampleEncoder | None], TargetReader]
    usage: str | None = None
    predictor: Predictor | None = None


_HEAD = TaskKind(
    heads.open_head_task,
    heads.checking_reader,
    heads_predict.USAGE,
    Predictor(heads.saved_reader, heads_predict.add_head, labelling.label, heads_predict.saved_scores),
)

TASKS: dict[str, TaskKind] = {
    "classification": _HEAD,
    "regression": _HEAD,
    "multilabel": _HEAD,
    "ranking": _HEAD,
    "grounding": TaskKind(grounding.open_grounding, grounding.checking_reader, grounding_predict.USAGE),
}


def open_task(
    parsed: ParsedArguments,
    config: PretrainedConfig,
    train: Sequence[SampledTable],
    held_out: Sequence[SampledTable],
    encoder: SampleEncoder,
) -> Task:
    """Return the task of a run; every rank has to call it.

    Args:
        parsed: Settings of the run.
        config: Config of the model.
        train: Training datasets, from which a task learns its classes, for instance.
        held_out: Evaluation datasets.
        encoder: Encoder of samples, without the task.

    Raises:
        UserError: the settings or the data do not fit the task.
    """
    name = parsed.tasks.task
    return Task() if name is None else TASKS[name].open(parsed, config, train, held_out, encoder)


def saved_kind(folder: str) -> TaskKind | None:
    """Return the kind of the task whose module a folder holds; None for a folder without one.

    Raises:
        UserError: ``task.json`` is damaged, or names no task of this trainer.
    """
    if not is_task_folder(folder):
        return None
    name = read_record(folder).get("task")
    if name not in TASKS:
        raise UserError(f"{folder}/{RECORD_FILE} names the task {name!r}, which is none of {', '.join(TASKS)}.")
    return TASKS[name]


def saved_predictor(folder: str) -> Predictor | None:
    """Return how the model of a folder predicts; None where it answers in words."""
    kind = saved_kind(folder)
    return None if kind is None else kind.predictor
