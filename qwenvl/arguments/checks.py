"""What the argument classes say about each other."""

from __future__ import annotations

import logging

from qwenvl.arguments.data import DataArguments
from qwenvl.arguments.model import ModelArguments
from qwenvl.arguments.optimizers import check_optimizer
from qwenvl.arguments.training import TrainingArguments
from qwenvl.utilities.errors import UserError

logger = logging.getLogger(__name__)

BATCH_FLAGS = frozenset({"group_by_length", "train_sampling_strategy", "length_column_name", "dataloader_drop_last"})
"""Flags of transformers that choose or drop samples in ways that batches here are not made."""


def check_required(model: ModelArguments, data: DataArguments, output_dir: str | None) -> None:
    """Check that what no default can replace was given.

    Raises:
        UserError: one of them is missing.
    """
    if not model.model_name_or_path:
        raise UserError("--model_name_or_path is missing: give a checkpoint's folder or Hugging Face id.")
    if not data.dataset_use.strip() and data.packing_plan is None:  # a plan names its datasets
        raise UserError("--dataset_use is missing: name one or more datasets of the registry, separated by commas.")
    if not output_dir:
        raise UserError("--output_dir is missing: name a folder for checkpoints and the trained model.")


def check_together(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Check settings of different classes against each other.

    Raises:
        UserError: nothing is trained, evaluation is asked for without data, or a flag is not supported.
    """
    if not (model.tune_mm_llm or model.tune_mm_mlp or model.tune_mm_vision):
        raise UserError(
            "nothing would be trained: set one or more of --tune_mm_llm, --tune_mm_mlp and --tune_mm_vision to True."
        )
    if training.torch_compile and (training.deepspeed or training.fsdp):
        raise UserError(
            "--torch_compile with --deepspeed or --fsdp is not supported: they gather the weights of a layer while it "
            "runs. Leave one of them out."
        )
    if training.label_smoothing_factor:
        raise UserError("--label_smoothing_factor is not supported: the loss is plain cross entropy. Leave it out.")
    check_optimizer(training)
    if _evaluates(training) and not _has_evaluation_data(data):
        raise UserError(
            "there is nothing to evaluate on, and --eval_strategy or --eval_on_start asks for it. Add "
            "--eval_dataset_use NAMES or --eval_ratio 0.01, or leave these out."
        )


def log_without_effect(
    model: ModelArguments, data: DataArguments, training: TrainingArguments, given: frozenset[str]
) -> None:
    """Log, once each, what was set but changes nothing.

    Args:
        model: model arguments.
        data: data arguments.
        training: training arguments.
        given: names of the settings that the user gave.
    """
    if "base_interval" in given:
        logger.info("base_interval has no effect, here as in the official recipe.")
    for rate, switch in (("mm_projector_lr", "tune_mm_mlp"), ("vision_tower_lr", "tune_mm_vision")):
        if getattr(training, rate) is not None and not getattr(model, switch):
            logger.warning("--%s has no effect: --%s is False.", rate, switch)
    for name in sorted(given & BATCH_FLAGS):
        logger.warning(
            "--%s has no effect: every epoch holds each sample once, in a new order. --group_by_cost True makes steps "
            "of rows of similar cost and length.",
            name,
        )
    if adapters := sorted(given & {"lora_r", "lora_alpha", "lora_dropout"}):
        logger.info("%s: no effect without adapters.", ", ".join(adapters))
    if "group_by_cost" in given and data.data_packing:
        logger.info("group_by_cost has no effect with packs: their steps are balanced without it.")
    if _has_evaluation_data(data) and not _evaluates(training):
        logger.warning("Evaluation data are set, but --eval_strategy is no: nothing is evaluated.")


def _evaluates(training: TrainingArguments) -> bool:
    return training.eval_strategy != "no" or training.eval_on_start


def _has_evaluation_data(data: DataArguments) -> bool:
    return bool(data.eval_dataset_use or data.eval_ratio)
