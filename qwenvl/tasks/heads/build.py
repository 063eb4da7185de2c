"""Build a head from the settings and labels of a run, and label readers for the commands."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from qwenvl.config import ParsedArguments, TaskArguments
from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.tasks.heads.head import HeadSpec
from qwenvl.tasks.heads.label_counts import (
    LabelStatistics,
    class_weights,
    count_labels,
    label_reader,
    order_classes,
)
from qwenvl.tasks.heads.labels import LabelReader
from qwenvl.tasks.heads.objective import HeadObjective
from qwenvl.tasks.objective import Task
from qwenvl.utils.distributed import from_main_process
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)


def open_head_task(
    parsed: ParsedArguments,
    config: PretrainedConfig,
    train: Sequence[SampledTable],
    held_out: Sequence[SampledTable],
    encoder: SampleEncoder,
) -> Task:
    """Return the task of a run, for :attr:`qwenvl.tasks.registry.TaskKind.open`; classes and scale come from labels."""
    del encoder
    chosen, skip = parsed.tasks, parsed.data.on_bad_sample == "skip"
    reader = label_reader(chosen)
    found = from_main_process(lambda: count_labels(train, reader, skip=skip))
    classes = reader.classes or order_classes(found.names)
    reader = replace(reader, classes=classes, outputs=len(found.sums))
    _require_enough(chosen, found, classes)
    from_main_process(lambda: count_labels(held_out, reader, skip=skip))  # report bad labels before training starts
    means, deviations = found.mean_and_deviation()
    assert chosen.task is not None
    spec = HeadSpec(
        task=chosen.task,
        hidden_size=config.get_text_config().hidden_size,
        outputs=len(classes) or len(means) or 1,
        pooling=chosen.chosen_pooling,
        hidden_layer=chosen.hidden_layer,
        head=chosen.head,
        classes=classes,
        loss=chosen.chosen_loss,
        class_weights=class_weights(chosen.class_weights, chosen.weights_by_name(), found.names, classes),
        focal_gamma=chosen.focal_gamma,
        huber_delta=chosen.huber_delta,
        means=means,
        deviations=deviations,
        keep_answer=chosen.keep_answer,
    )
    _log(spec, found)
    return Task(HeadObjective(spec, parsed.training.seed, chosen.head_lr), reader)


def checking_reader(chosen: TaskArguments, encoder: SampleEncoder | None) -> LabelReader:
    """Return a reader of labels for ``tools/check_image.py``."""
    del encoder
    return label_reader(chosen)


def saved_reader(record: Mapping[str, Any]) -> LabelReader:
    """Return a reader of samples for a saved head; labels are optional.

    Raises:
        UserError: ``task.json`` does not describe a head.
    """
    spec = HeadSpec.from_record(record)
    needs_media = spec.pooling == "vision_mean"
    return LabelReader(spec.task, spec.classes, len(spec.means), needs_media, not spec.keep_answer, optional=True)


def _require_enough(chosen: TaskArguments, found: LabelStatistics, classes: Sequence[str]) -> None:
    if not found.samples:
        raise UserError(f"--task {chosen.task}: no training row has a usable label.")
    if chosen.task == "classification" and len(classes) < 2:
        raise UserError(
            f"--task classification: all training rows have the label {classes[0]!r}; it needs two or more classes."
        )
    if chosen.task == "multilabel" and not classes:
        raise UserError("--task multilabel: the labels of all training rows are empty lists.")


def _log(spec: HeadSpec, found: LabelStatistics) -> None:
    if spec.classes:
        counts = ", ".join(f"{name} {found.names[name]:,}" for name in spec.classes[:20])
        more = f" and {len(spec.classes) - 20} more" if len(spec.classes) > 20 else ""
        logger.info("Labels: %d samples, %d classes: %s%s.", found.samples, len(spec.classes), counts, more)
    elif spec.means:
        pairs = zip(spec.means, spec.deviations, strict=True)
        numbers = ", ".join(f"{mean:.4g} ± {deviation:.4g}" for mean, deviation in pairs)
        logger.info("Labels: %d samples, mean and deviation %s.", found.samples, numbers)
    else:
        logger.info("Labels: %d samples with ranked images.", found.samples)
