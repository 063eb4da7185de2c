"""What ``--task`` chooses: an objective, and what it wants to know of the samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig

from qwenvl.config import ParsedArguments, TaskArguments
from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.targets import TargetReader
from qwenvl.tasks.grounding.module import GroundingSettings
from qwenvl.tasks.grounding.objective import Grounding
from qwenvl.tasks.grounding.phrases import MaskReader
from qwenvl.tasks.heads.head import HeadSpec
from qwenvl.tasks.heads.label_counts import (
    LabelStatistics,
    class_weights,
    count_labels,
    label_reader,
    order_classes,
)
from qwenvl.tasks.heads.objective import HeadObjective
from qwenvl.tasks.objective import Objective
from qwenvl.utils.distributed import from_main_process
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What a run learns.

    Args:
        objective: how.
        targets: reads what it wants to know of each sample; None for language modelling.
    """

    objective: Objective = field(default_factory=Objective)
    targets: TargetReader | None = None


def open_task(
    parsed: ParsedArguments,
    config: PretrainedConfig,
    train: Sequence[SampledTable],
    held_out: Sequence[SampledTable],
    encoder: SampleEncoder,
) -> Task:
    """Return the task of a run; every rank has to call it.

    Args:
        parsed: its settings.
        config: of the model.
        train: what is trained on, from which a task learns its classes, for instance.
        held_out: what is evaluated on.
        encoder: of samples, without the task.

    Raises:
        UserError: the settings or the data do not fit the task.
    """
    if parsed.tasks.task == "grounding":
        return _open_grounding(parsed, encoder)
    return Task() if parsed.tasks.task is None else _open_head(parsed, config, train, held_out)


def _open_grounding(parsed: ParsedArguments, encoder: SampleEncoder) -> Task:
    chosen = parsed.tasks
    settings = GroundingSettings(
        resolution=chosen.mask_resolution,
        merge=chosen.attention_merge,
        channels=chosen.mask_channels,
        learning_rate=chosen.head_lr,
        seed=parsed.training.seed,
    )
    finer = () if chosen.sam_model_name_or_path is None else (settings.refined_resolution,)
    merge_size, turn_end = encoder.settings.merge_size, encoder.template.turn_end
    reader = MaskReader(encoder.tokenizer, turn_end, merge_size, (settings.resolution, *finer))
    return Task(Grounding(settings, chosen.sam_model_name_or_path), reader)


def _open_head(
    parsed: ParsedArguments, config: PretrainedConfig, train: Sequence[SampledTable], held_out: Sequence[SampledTable]
) -> Task:
    chosen, skip = parsed.tasks, parsed.data.on_bad_sample == "skip"
    reader = label_reader(chosen)
    found = from_main_process(lambda: count_labels(train, reader, skip=skip))
    classes = reader.classes or order_classes(found.names)
    reader = replace(reader, classes=classes, outputs=len(found.sums))
    _require_enough(chosen, found, classes)
    from_main_process(lambda: count_labels(held_out, reader, skip=skip))  # before the first evaluation meets them
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


def _require_enough(chosen: TaskArguments, found: LabelStatistics, classes: Sequence[str]) -> None:
    if not found.samples:
        raise UserError(f"--task {chosen.task}: none of the training rows has a label that can be used.")
    if chosen.task == "classification" and len(classes) < 2:
        raise UserError(
            f"--task classification: all training rows have the label {classes[0]!r}: nothing to tell apart."
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
        logger.info("Labels: %d samples with ranked pictures.", found.samples)
