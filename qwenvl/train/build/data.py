"""The data of a run: processor, datasets, order and evaluation, opened before the model loads."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, ProcessorMixin

from qwenvl.config import ParsedArguments
from qwenvl.data.dataset import ConversationDataset, SampledTable, open_tables, split_tables
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import (
    AddedTokens,
    add_tokens,
    build_encoder,
    open_processor,
)
from qwenvl.data.media.video.decode import prepare_backend
from qwenvl.data.overlap import shared_rows
from qwenvl.data.packing.plan import planned_datasets
from qwenvl.data.sampler import SampleOrder
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.data.types import DatasetSpec
from qwenvl.families import Family
from qwenvl.models.rope_scaling import context_length, extend_context
from qwenvl.tasks.objective import Objective
from qwenvl.tasks.registry import open_task
from qwenvl.train.build.model import origin_options
from qwenvl.train.build.packing import Arrangement, arrange
from qwenvl.utils.distributed import from_main_process

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Args:
        processor: Processor of the checkpoint, with its own pixel and frame limits.
        encoder: Encoder of samples to model inputs.
        arranged: Training samples, packed if requested, and their order.
        evaluation: Evaluation samples, or None.
        added_tokens: Tokens of ``--additional_tokens``.
        objective: Objective of the training.
    """

    processor: ProcessorMixin
    encoder: SampleEncoder
    arranged: Arrangement
    evaluation: ConversationDataset | None
    added_tokens: AddedTokens = field(default_factory=AddedTokens)
    objective: Objective = field(default_factory=Objective)

    @property
    def train(self) -> ConversationDataset:
        """Training samples."""
        return self.arranged.dataset

    @property
    def order(self) -> SampleOrder:
        """Order of the training samples."""
        return self.arranged.order


def open_config(parsed: ParsedArguments) -> PretrainedConfig:
    """Read the checkpoint's config, with its context extended if the arguments request it.

    Raises:
        UserError: Its context cannot be extended.
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
        UserError: Registry, annotations or processor cannot be used, or no sample fits.
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
    prepare_backend()
    seed = 0 if args.data_seed is None else args.data_seed  # not --seed, which must not change the held-out rows
    registry = load_registry(arguments.dataset_registry)
    plan = Path(arguments.packing_plan or "")
    names = arguments.dataset_use or from_main_process(lambda: planned_datasets(plan))
    tables = _open_tables(parse_dataset_use(names, registry), seed, arguments.data_cache_dir)
    held_out: list[SampledTable] = []
    if arguments.eval_dataset_use:
        named = parse_dataset_use(arguments.eval_dataset_use, registry, "--eval_dataset_use")
        held_out = _open_tables(named, seed, arguments.data_cache_dir)
        for name, count in shared_rows(tables, held_out).items():
            logger.warning(
                "%d rows of the evaluation dataset %r are training rows too, so that its loss and answers show what is "
                "remembered. Hold rows out by --eval_ratio, or name other data.",
                count,
                name,
            )
    elif arguments.eval_ratio:
        tables, held_out = split_tables(tables, arguments.eval_ratio, seed)
    task = open_task(parsed, config, tables, held_out, encoder)
    encoder = replace(encoder, targets=task.targets)
    skip = arguments.on_bad_sample == "skip"
    train = ConversationDataset(tables, encoder, skip)
    evaluation = ConversationDataset(held_out, encoder, skip) if held_out else None
    train.require_usable_sample("training")
    if evaluation is not None:
        evaluation.require_usable_sample("evaluation")
    arranged = arrange(train, parsed, config, family)
    return RunData(processor, encoder, arranged, evaluation, added_tokens, task.objective)


def _open_tables(specs: list[DatasetSpec], seed: int, cache_dir: str | None) -> list[SampledTable]:
    """Open datasets, in process 0 first, so that the others find them in the cache."""
    opened: list[SampledTable] = []
    from_main_process(lambda: opened.extend(open_tables(specs, seed, cache_dir)))
    return opened or open_tables(specs, seed, cache_dir)
