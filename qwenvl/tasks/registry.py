"""The tasks by name (``--task``), and the functions through which the trainer and the commands use them."""

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
from qwenvl.tasks.multi_token import MultiTokenObjective
from qwenvl.tasks.objective import Task
from qwenvl.utils.errors import UserError


@dataclass(frozen=True)
class Predictor:
    """Prediction by a saved model of a task that does not answer in words.

    Args:
        reader: Function of ``task.json`` that returns a reader of the samples to predict.
        open: Function of an open model and its folder that returns the model with the module of the task.
        answer: Function that predicts rows, with the arguments of :func:`qwenvl.inference.answer_rows.answer`.
        scores: Function of folder, stock model and a sample's inputs that recomputes the ``Objective.scores``.
    """

    reader: Callable[[Mapping[str, Any]], TargetReader]
    open: Callable[[Any, str], Any]
    answer: Callable[..., None]
    scores: Callable[[str, Any, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class TaskKind:
    """The functions and data of a task.

    Args:
        open: Function of settings, config, training datasets, evaluation datasets and encoder that returns the task
            of a run.
        reader: Function of flags and encoder (None without a model) that returns a reader for ``tools/check_image.py``.
        usage: Python code for the model card that opens a saved folder ``{name}``; None for the code of a plain model.
        predictor: Prediction by a saved model; None where it answers in words, as without a task.
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
        train: Training datasets, from which a task reads its classes, for instance.
        held_out: Evaluation datasets.
        encoder: Encoder of samples without the task's targets.

    Raises:
        UserError: the settings or the data do not fit the task.
    """
    name = parsed.tasks.task
    if parsed.model.train_mtp:
        return Task(MultiTokenObjective(parsed.model.mtp_loss_weight))
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
        raise UserError(f"{folder}/{RECORD_FILE} names the task {name!r}, which is not one of {', '.join(TASKS)}.")
    return TASKS[name]


def saved_predictor(folder: str) -> Predictor | None:
    """Return the predictor for the model of a folder; None where it answers in words."""
    kind = saved_kind(folder)
    return None if kind is None else kind.predictor
