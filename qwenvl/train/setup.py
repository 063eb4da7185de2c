"""From parsed arguments to a finished run: every part is opened in the order in which mistakes are cheapest."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, ProcessorMixin

from qwenvl.arguments import ParsedArguments, TrainingArguments, arguments_to_yaml
from qwenvl.data.collation import Collator, Event
from qwenvl.data.dataset import ConversationDataset, SampledTable, open_tables, split_tables
from qwenvl.data.encoding import SampleEncoder
from qwenvl.data.plans import planned_datasets
from qwenvl.data.processor import (
    AddedTokens,
    add_tokens,
    build_encoder,
    log_limits,
    open_processor,
    processor_limits,
    with_training_limits,
)
from qwenvl.data.registry import load_registry, parse_dataset_use
from qwenvl.data.sampling import SampleOrder
from qwenvl.data.types import DatasetSpec
from qwenvl.data.video import prepare_backend
from qwenvl.models.context import context_length, extend_context, require_same_context
from qwenvl.models.loading import read_model_type, refuse_flattening
from qwenvl.train import interruption
from qwenvl.train.arrangement import arrange
from qwenvl.train.checkpoints import Engine, find_checkpoint, require_writable
from qwenvl.train.exporting import verify_export
from qwenvl.train.held_out import HeldOutQuestions
from qwenvl.train.measured import MeasuredTrainer
from qwenvl.train.model_card import describe_run
from qwenvl.train.model_setup import open_model, origin_options
from qwenvl.train.reshaping import fitted_to_ranks
from qwenvl.train.saving import Records
from qwenvl.train.wholeness import read_source
from qwenvl.utilities.distributed import from_main_process, is_main_process
from qwenvl.utilities.errors import UserError
from qwenvl.utilities.families import Family, get_family

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Args:
        processor: the checkpoint's, as it was.
        encoder: record to model inputs.
        train: training samples.
        order: in which they are trained on.
        evaluation: evaluation samples, or None.
        events: what there is to report before training starts.
        added_tokens: of ``--additional_tokens``.
    """

    processor: ProcessorMixin
    encoder: SampleEncoder
    train: ConversationDataset
    order: SampleOrder
    evaluation: ConversationDataset | None
    events: tuple[Event, ...] = ()
    added_tokens: AddedTokens = field(default_factory=AddedTokens)


def run(parsed: ParsedArguments) -> int:
    """Train, evaluate and save as the arguments say; return the exit code: 0, or 75 if a signal stopped the run.

    Raises:
        UserError: something in the user's input must be changed.
    """
    args = parsed.training
    engine = _engine(args)
    if engine != "plain":
        _require_launcher(engine)
    settings_yaml = arguments_to_yaml(parsed)
    family = get_family(read_model_type(parsed.model.model_name_or_path, cache_dir=args.cache_dir))
    if args.router_aux_loss_coef and not family.moe:
        raise UserError(
            f"--router_aux_loss_coef {args.router_aux_loss_coef:g}: {family.model_type} has no experts. Leave it out."
        )
    config = open_config(parsed)
    if parsed.data.data_flatten:
        refuse_flattening(config, family)
    require_writable(args.output_dir)
    data = open_data(parsed, family, config)
    model = open_model(parsed, data.processor, config, data.added_tokens)
    source = read_source(parsed.model.model_name_or_path, cache_dir=args.cache_dir)
    records = Records(settings_yaml, processor_limits(data.processor), source)
    trainer = build_trainer(parsed, model, data, records)
    checkpoint = from_main_process(lambda: find_checkpoint(args.output_dir, args.resume_from_checkpoint, engine))
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
        require_same_context(config, checkpoint)
        if not args.ignore_data_skip:
            from_main_process(partial(trainer.require_same_order, checkpoint))
        trainer.data_report.take_up()
        trainer.running_loss.take_up(checkpoint)
    else:
        trainer.data_report.start_over()
    trainer.data_report.add(data.events, common=True)
    with trainer.stop_request.listening(), fitted_to_ranks(checkpoint, trainer) as folder:
        trainer.train(resume_from_checkpoint=folder)
    if trainer.stop_request.stopped_at is not None:
        logger.info(
            "Stopped on request after step %d of %d, which is saved in %s. The same command goes on from there.",
            trainer.stop_request.stopped_at,
            trainer.state.max_steps,
            args.output_dir,
        )
        return interruption.EXIT_CODE
    trainer.save_state()
    summary = trainer.data_report.summary()
    trainer.save_final(describe_run(parsed, data.train, data.evaluation, summary))
    for line in summary:
        if is_main_process():
            logger.warning("%s", line)
    verify_export(trainer, (data.evaluation, data.train), data.processor)
    logger.info(
        "Saved to %s: it opens with transformers' AutoModelForImageTextToText and AutoProcessor.", args.output_dir
    )
    return 0


def open_config(parsed: ParsedArguments) -> PretrainedConfig:
    """Read the checkpoint's config, with the context that the arguments ask for.

    Raises:
        UserError: its context cannot be extended.
    """
    arguments = parsed.model
    config = AutoConfig.from_pretrained(arguments.model_name_or_path, **origin_options(parsed))
    if arguments.rope_scaling is not None:
        assert arguments.rope_factor is not None
        extend_context(config, arguments.rope_factor, arguments.rope_native_length)
    return config


def open_data(parsed: ParsedArguments, family: Family, config: PretrainedConfig) -> RunData:
    """Open processor and datasets.

    Raises:
        UserError: registry, annotations or processor cannot be used, or no sample fits.
    """
    arguments, args = parsed.data, parsed.training
    processor = open_processor(parsed.model.model_name_or_path, args.cache_dir, parsed.model.trust_remote_code)
    added_tokens = add_tokens(processor, arguments.additional_tokens or ())
    context = context_length(config)
    if args.model_max_length > context:
        logger.warning(
            "--model_max_length %d is above the context of the model, %d positions: a sample that takes more of them "
            "is an error. --rope_scaling yarn extends the context.",
            args.model_max_length,
            context,
        )
    encoder = build_encoder(processor, config, family, arguments, args.model_max_length, context)
    log_limits(encoder.settings)
    prepare_backend()
    seed = 0 if args.data_seed is None else args.data_seed  # not --seed: another one must not move held-out rows
    registry = load_registry(arguments.dataset_registry)
    plan = Path(arguments.packing_plan or "")
    names = arguments.dataset_use or from_main_process(lambda: planned_datasets(plan))
    tables = _open_tables(parse_dataset_use(names, registry), seed, arguments.data_cache_dir)
    held_out: list[SampledTable] = []
    if arguments.eval_dataset_use:
        named = parse_dataset_use(arguments.eval_dataset_use, registry, "--eval_dataset_use")
        held_out = _open_tables(named, seed, arguments.data_cache_dir)
    elif arguments.eval_ratio:
        tables, held_out = split_tables(tables, arguments.eval_ratio, seed)
    skip = arguments.on_bad_sample == "skip"
    train = ConversationDataset(tables, encoder, skip)
    evaluation = ConversationDataset(held_out, encoder, skip) if held_out else None
    train.require_usable_sample("training")
    if evaluation is not None:
        evaluation.require_usable_sample("evaluation")
    logger.info("Data: %d training rows, %d evaluation rows.", len(train), len(evaluation) if evaluation else 0)
    arranged = arrange(train, parsed, config, family)
    return RunData(processor, encoder, arranged.dataset, arranged.order, evaluation, arranged.events, added_tokens)


def _open_tables(specs: list[DatasetSpec], seed: int, cache_dir: str | None) -> list[SampledTable]:
    """Open datasets in process 0 first: what it leaves in the cache, the others find."""
    opened: list[SampledTable] = []
    from_main_process(lambda: opened.extend(open_tables(specs, seed, cache_dir)))
    return opened or open_tables(specs, seed, cache_dir)


def build_trainer(parsed: ParsedArguments, model: PreTrainedModel, data: RunData, records: Records) -> MeasuredTrainer:
    """Put model, data and settings together."""
    tokenizer: Any = data.processor.tokenizer
    training_limits = parsed.data.save_processor_limits == "training"
    return MeasuredTrainer(
        model=model,
        args=parsed.training,
        train_dataset=data.train,
        order=data.order,
        eval_dataset=data.evaluation,
        collator=Collator(tokenizer.pad_token_id, parsed.data.data_flatten),
        processor=with_training_limits(data.processor, data.encoder.settings) if training_limits else data.processor,
        records=records,
        questions=_held_out_questions(parsed.training, data),
    )


def _held_out_questions(args: TrainingArguments, data: RunData) -> HeldOutQuestions | None:
    if not args.eval_generate or data.evaluation is None:
        return None
    return HeldOutQuestions(data.evaluation, data.processor, args.eval_generate, args.data_seed or 0)


def _engine(args: TrainingArguments) -> Engine:
    return "deepspeed" if args.deepspeed else "fsdp" if args.fsdp else "plain"


def _require_launcher(engine: Engine) -> None:
    """FSDP needs a process group, and DeepSpeed asks for the rank even where there is one process.

    Raises:
        UserError: nothing has told this process its rank.
    """
    if "RANK" not in os.environ:
        raise UserError(
            f"--{engine} needs a launcher, for one GPU too: torchrun --nproc_per_node=1 "
            f"qwenvl/train/train_qwen.py ..., or leave --{engine} out."
        )
