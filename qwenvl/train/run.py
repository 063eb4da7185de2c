"""Run training from parsed arguments; the fastest checks come first."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from qwenvl.config import ParsedArguments, TrainingArguments, arguments_to_yaml
from qwenvl.config.rules.best_metric import OF_DATASET, OF_VIEWS, available_metrics, require_metric
from qwenvl.data.collator import Collator
from qwenvl.data.encoding.processor import (
    processor_limits,
    with_training_limits,
)
from qwenvl.families import FAMILIES, Family, get_family
from qwenvl.metrics.registry import METRICS
from qwenvl.models.attention.linear_segments import PACKAGES, missing_kernels
from qwenvl.models.loading import read_trainable
from qwenvl.models.quantization import is_fp8
from qwenvl.models.rope_scaling import require_same_context
from qwenvl.models.task_module import readout_of
from qwenvl.tasks import files as task_files
from qwenvl.train.build.data import RunData, open_config, open_data
from qwenvl.train.build.model import open_model
from qwenvl.train.callbacks import preemption as interruption
from qwenvl.train.callbacks.run_report import RunReport, Sources, describe_setup
from qwenvl.train.checkpoint.carried_tensors import carried_tensors, log_carried
from qwenvl.train.checkpoint.folder import Engine, find_checkpoint, read_step, require_state_dict, require_writable
from qwenvl.train.checkpoint.folder_check import read_source
from qwenvl.train.checkpointing_trainer import Records
from qwenvl.train.dry_run.preflight import preflight
from qwenvl.train.eval_prompts import EvalPrompts
from qwenvl.train.export.model_card import describe_run
from qwenvl.train.records.run_info import used_rows
from qwenvl.train.records.serving import describe_serving
from qwenvl.train.records.summary import log_start
from qwenvl.train.resume.settings import Change, compare_settings, forgets_best
from qwenvl.train.resume.zero_universal import fitted_to_ranks
from qwenvl.train.trainer import Trainer
from qwenvl.train.verify_export import verify_export
from qwenvl.utils.distributed import from_main_process, is_main_process
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import collected_warnings

logger = logging.getLogger(__name__)


def run(parsed: ParsedArguments) -> int:
    """Train, evaluate and save according to the arguments; return the exit code: 0, or 75 if a signal stopped the run.

    Raises:
        UserError: Something in the user's input must be changed.
    """
    with collected_warnings() as warnings:
        return _run(parsed, warnings)


def _run(parsed: ParsedArguments, warnings: Sequence[str]) -> int:
    args = parsed.training
    engine = _engine(args)
    if args.eval_generate:
        _require_best_metric(parsed, METRICS)
    family = _family(parsed, engine)
    if engine != "plain":
        _require_launcher(engine, args.dry_run)
        _refuse_engine(engine, family)
    settings_yaml = arguments_to_yaml(parsed)
    _refuse_other_families(parsed, family)
    config = open_config(parsed)
    if parsed.data.data_flatten:
        _warn_slow_packing(family)
    require_writable(args.output_dir)
    checkpoint, changes = (None, []) if args.dry_run else from_main_process(lambda: _find_checkpoint(parsed, engine))
    if checkpoint is not None:
        require_same_context(config, checkpoint)
    data = open_data(parsed, family, config)
    prompts = _eval_prompts(parsed, data)
    if args.dry_run:
        from_main_process(lambda: preflight(parsed, data, config))
        return 0
    model = open_model(parsed, data.processor, config, data.added_tokens, objective=data.objective)
    source = read_source(parsed.model.model_name_or_path, cache_dir=args.cache_dir)
    if not parsed.adapters.lora_enable:
        log_carried(carried_tensors(source, model), model)
    serving = describe_serving(data.encoder, [table.table.spec for table in data.train.tables])
    used = [asdict(rows) for rows in used_rows(data)]
    records = Records(settings_yaml, processor_limits(data.processor), source, serving, used)
    trainer = build_trainer(parsed, model, data, records, prompts)
    report = _open_report(parsed, trainer, data, prompts, warnings)
    if checkpoint is not None:
        task_files.require_same_task(readout_of(model), checkpoint)
        args.ignore_data_skip = from_main_process(partial(trainer.position.begins_again, checkpoint, trainer.sharding))
        trainer.forgets_best = forgets_best(changes)
    _take_up_records(trainer, checkpoint)
    trainer.data_report.add(data.arranged.events, common=True)
    log_start(parsed, model, data, checkpoint)
    with trainer.stop_request.listening(), fitted_to_ranks(checkpoint, trainer) as folder:
        trainer.train(resume_from_checkpoint=folder)
    return _finish(parsed, trainer, data, report)


def _find_checkpoint(parsed: ParsedArguments, engine: Engine) -> tuple[str | None, list[Change]]:
    """Return the checkpoint to resume from and the changed settings; (None, []) for a new run."""
    args = parsed.training
    every_byte = args.checkpoint_hash == "full"
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint, engine, every_byte=every_byte)
    if checkpoint is None:
        return None, []
    if engine == "fsdp":
        require_state_dict(checkpoint, args.fsdp_plugin_args["state_dict_type"])
    return checkpoint, compare_settings(checkpoint, parsed.given)


def _finish(parsed: ParsedArguments, trainer: Trainer, data: RunData, report: RunReport) -> int:
    """Save the model and write the report; return the exit code."""
    trainer.sample_losses.write()
    if trainer.stop_request.stopped_at is not None:
        stopped = f"Stopped on request after step {trainer.stop_request.stopped_at} of {trainer.state.max_steps}"
        logger.info(
            "%s, which is saved in %s. Run the same command again to resume.", stopped, parsed.training.output_dir
        )
        report.write(trainer.state, f"{stopped}. Run the same command again to resume.")
        report.log_place()
        return interruption.EXIT_CODE
    if parsed.tasks.task is not None and data.evaluation is not None:
        _evaluate_at_end(trainer)
    steps = trainer.state.global_step
    report.write(trainer.state, f"Finished after {steps:,} step{'s' * (steps != 1)}.")
    _save_and_verify(parsed, trainer, data)
    report.log_place()
    return 0


def _evaluate_at_end(trainer: Trainer) -> None:
    """Evaluate the finished model, unless the last step was evaluated; every rank must call it."""
    evaluated = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    if trainer.state.global_step not in evaluated:
        trainer.evaluate()


def _open_report(
    parsed: ParsedArguments,
    trainer: Trainer,
    data: RunData,
    prompts: EvalPrompts | None,
    warnings: Sequence[str],
) -> RunReport:
    """Return the run's report, which the trainer will update at every evaluation."""
    sources = Sources(trainer.data_report, trainer.answers, prompts, warnings)
    rows = used_rows(data)
    report = RunReport(
        parsed.training.output_dir, describe_setup(parsed, trainer.model, trainer.objective.unit), rows, sources
    )
    trainer.add_callback(report)
    return report


def _take_up_records(trainer: Trainer, checkpoint: str | None) -> None:
    """Continue the records next to the checkpoints, up to the checkpoint to resume from; or start new ones."""
    if checkpoint is None:
        trainer.data_report.start_over()
        if is_main_process():
            trainer.answers.start_over()
        return
    trainer.data_report.take_up()
    trainer.running_loss.take_up(checkpoint)
    trainer.dataset_losses.take_up(checkpoint)
    trainer.sample_losses.take_up(read_step(checkpoint))
    if is_main_process():
        trainer.answers.take_up(read_step(checkpoint))


def _save_and_verify(parsed: ParsedArguments, trainer: Trainer, data: RunData) -> None:
    """Save the finished model, and verify that stock libraries can use it."""
    trainer.save_state()
    summary = trainer.data_report.summary()
    trainer.save_final(describe_run(parsed, used_rows(data), summary))
    for line in summary:
        if is_main_process():
            logger.warning("%s", line)
    verify_export(trainer, (data.evaluation, data.train), data.processor)
    logger.info("Saved to %s; its README.md shows how to load it.", parsed.training.output_dir)


def build_trainer(
    parsed: ParsedArguments,
    model: PreTrainedModel,
    data: RunData,
    records: Records,
    prompts: EvalPrompts | None = None,
) -> Trainer:
    """Build the trainer from model, data and settings."""
    tokenizer: Any = data.processor.tokenizer
    training_limits = parsed.data.save_processor_limits == "training"
    return Trainer(
        model=model,
        args=parsed.training,
        train_dataset=data.train,
        order=data.order,
        eval_dataset=data.evaluation,
        collator=Collator(tokenizer.pad_token_id, parsed.data.data_flatten),
        processor=with_training_limits(data.processor, data.encoder.settings) if training_limits else data.processor,
        records=records,
        objective=data.objective,
        prompts=prompts,
    )


def _eval_prompts(parsed: ParsedArguments, data: RunData) -> EvalPrompts | None:
    """Choose the samples that the model answers at evaluations; None without ``--eval_generate``.

    Raises:
        UserError: ``--metric_for_best_model`` is not among the metrics of evaluations.
    """
    args = parsed.training
    if data.evaluation is None:
        return None
    datasets = dict.fromkeys(table.table.spec.name for table in data.evaluation.tables if len(table.rows))
    if not args.eval_generate:
        _require_best_metric(parsed, (), datasets)
        return None
    prompts = EvalPrompts(data.evaluation, data.processor, args.eval_generate, args.data_seed or 0)
    advice = " The expected answers determine the available metrics."
    views = [f"{name}{OF_DATASET}{one}" for one in prompts.compared for name in OF_VIEWS if args.eval_blind]
    _require_best_metric(parsed, [*prompts.metrics, *views], datasets, advice)
    return prompts


def _require_best_metric(
    parsed: ParsedArguments, answers: Iterable[str], datasets: Iterable[str] = (), advice: str = ""
) -> None:
    """Check that evaluations report ``--metric_for_best_model``, and that of a dataset where datasets are known.

    Raises:
        UserError: It is neither one of the task's metrics nor one of the answers'.
    """
    args = parsed.training
    if args.metric_for_best_model is not None:
        available = available_metrics(parsed.tasks.metrics, answers, blind=args.eval_blind, datasets=datasets)
        require_metric(args.metric_for_best_model, available, advice)


def _engine(args: TrainingArguments) -> Engine:
    return "deepspeed" if args.deepspeed else "fsdp" if args.fsdp else "plain"


def _family(parsed: ParsedArguments, engine: Engine) -> Family:
    """Return the family of the checkpoint.

    Raises:
        UserError: Its weights are quantized in a way that cannot be trained with these settings.
    """
    path, adapters = parsed.model.model_name_or_path, parsed.adapters
    own = read_trainable(path, cache_dir=parsed.training.cache_dir, adapted=adapters.lora_enable)
    other = f"--{engine}" if engine != "plain" else f"--quantization_bit {adapters.quantization_bit}"
    if is_fp8(own) and (engine != "plain" or adapters.quantization_bit):
        raise UserError(
            f"--model_name_or_path {path} has FP8 weights, which are dequantized for adapters; that does not go with "
            f"{other}. Leave it out (several GPUs train by DDP), or name the unquantized checkpoint of the same model."
        )
    return get_family(str(own["model_type"]))


def _refuse_engine(engine: Engine, family: Family) -> None:
    if not family.layout.sharded:
        raise UserError(
            f"--{engine} with {family.model_type}: its encoders run once per image size, so that ranks with sharded "
            f"weights would wait for each other. Train it with DDP: leave --{engine} out."
        )


def _refuse_other_families(parsed: ParsedArguments, family: Family) -> None:
    coefficient = parsed.training.router_aux_loss_coef
    if coefficient and not family.moe:
        raise UserError(f"--router_aux_loss_coef {coefficient:g}: {family.model_type} has no experts. Leave it out.")
    if parsed.model.train_mtp and not family.mtp:
        raise UserError(
            f"--train_mtp True: checkpoints of {family.model_type} have no layer for multi-token prediction; those of "
            f"{' and '.join(one.model_type for one in FAMILIES.values() if one.mtp)} have one. Leave it out."
        )


def _warn_slow_packing(family: Family) -> None:
    """Warn that packed rows are exact but slow if the kernels of linear attention are missing."""
    if family.linear_attention and (obstacle := missing_kernels()):
        logger.warning(
            "--data_flatten or --data_packing with %s: its linear attention runs one sample after the other, which is "
            "exact and slow, because its kernels cannot run here: %s. On a GPU: pip install %s.",
            *(family.model_type, obstacle, " ".join(PACKAGES.values())),
        )


def _require_launcher(engine: Engine, dry_run: bool) -> None:
    """Check that a launcher set this process's rank, which FSDP and DeepSpeed need even for a single process.

    Raises:
        UserError: It is not set.
    """
    if "RANK" not in os.environ and not dry_run:
        raise UserError(
            f"--{engine} needs a launcher, for one GPU too: torchrun --nproc_per_node=1 "
            f"qwenvl/train/train_qwen.py ..., or leave --{engine} out."
        )
