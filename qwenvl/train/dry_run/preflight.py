"""``--dry_run``: try everything that can fail later, and compute the size of the run. No GPU is needed.

Tokens, packs, steps and operations are exact. Memory is counted by running the step of the heaviest micro-batch on the
meta device (:mod:`qwenvl.profiling.activation_memory`). Hours are operations / (devices x peak x assumed MFU). A
checkpoint of config and processor alone is enough: its run is planned, so that it need not fit on this machine's disk.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import psutil
from rich.table import Table
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from qwenvl.config import ParsedArguments, TrainingArguments
from qwenvl.data.collator import Collator, for_model
from qwenvl.data.dataset import ConversationDataset, SampledTable
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.packing.lengths import measure_lengths
from qwenvl.data.types import History
from qwenvl.models.loading import has_no_weights
from qwenvl.profiling.activation_memory import StepMemory, measure_step
from qwenvl.profiling.flops import flops_of
from qwenvl.profiling.state_memory import StateMemory, StateSharding, estimate_states, loading_bytes, read_sharding
from qwenvl.train.build.data import RunData
from qwenvl.train.build.model import compute_type, open_model, weight_types
from qwenvl.train.dry_run.duplicates import warn_of_duplicates
from qwenvl.train.dry_run.report import NOT_COUNTED, describe_histories, describe_memory, describe_work, gib
from qwenvl.train.records.summary import describe_budget, describe_data, describe_model, describe_remarks
from qwenvl.train.schedule import plan_schedule, slowest_over_mean
from qwenvl.utils.cache import cache_folder
from qwenvl.utils.cores import available_cores
from qwenvl.utils.distributed import world_size
from qwenvl.utils.errors import SampleError, UserError
from qwenvl.utils.processes import in_processes
from qwenvl.utils.tables import as_text

logger = logging.getLogger(__name__)

_LOOKED_AT = 20
"""Number of rows at the start of a dataset, of which at least one must be decodable."""
_DEVICES_A_MACHINE = 8
_ROWS_A_TASK = 256
"""Number of rows per task of the processes that check keys."""


def preflight(parsed: ParsedArguments, data: RunData, config: PretrainedConfig) -> None:
    """Try, compute and report, in a single process.

    Raises:
        UserError: Something would stop the run.
    """
    args = parsed.training
    ranks = args.dry_run_devices or world_size()
    rows = ConversationDataset(data.train.tables, data.encoder, data.train.skips_bad_samples)
    lengths = measure_lengths(rows, cache_folder(parsed.data.data_cache_dir))
    measures = data.train.add_up(lengths.measures)
    for remark in describe_remarks(rows.tables, lengths.measures):
        logger.warning("%s", remark)
    for dataset in filter(None, (rows, data.evaluation)):
        decode_one_of_each(dataset)
        name_unread_keys(dataset)
    evaluated = () if data.evaluation is None else data.evaluation.tables
    warn_of_duplicates(rows.tables, evaluated, data.encoder, cache_folder(parsed.data.data_cache_dir))
    unset_hf_deepspeed_config()  # or the weights would be sharded across ranks that do not exist
    model = open_model(parsed, data.processor, config, data.added_tokens, objective=data.objective, on_meta=True)
    flops, sharding = flops_of(model), read_sharding(args, ranks)
    schedule = plan_schedule(len(data.train), args, ranks)
    states = count_states(model, sharding, parsed)
    planned = has_no_weights(parsed.model.model_name_or_path)
    if planned:
        logger.warning(
            "%s has no weights: its shapes are those of config.json. Training needs them.",
            parsed.model.model_name_or_path,
        )
    require_room_on_disk(args, states, planned=planned)
    warn_of_loading(states, sharding, psutil.virtual_memory().total)
    step = measure_heaviest(model, data, measures, parsed)
    data = replace(data, arranged=replace(data.arranged, measures=lengths.measures, events=lengths.events))
    imbalance = slowest_over_mean(data.order, flops.count(measures), args, ranks)
    parts: list[Table | str] = [
        *describe_model(parsed, model),
        *describe_data(data, schedule, args),
        describe_budget(args, data, schedule, None),
        describe_work(flops, measures, schedule, args, imbalance),
        *histories(rows, lengths.measures, parsed),
        describe_memory(sharding, states, step),
        NOT_COUNTED,
    ]
    logger.info("Dry run; nothing was trained.\n\n%s\n", as_text(*parts))


def count_states(model: PreTrainedModel, sharding: StateSharding, parsed: ParsedArguments) -> StateMemory:
    """Return the memory of a model's state with the settings of a run.

    Args:
        model: Model ready for training, on any device.
        sharding: Sharding over devices.
        parsed: Settings of the run.
    """
    optimizer = str(getattr(parsed.training.optim, "value", parsed.training.optim))
    quantized = bool(parsed.adapters.quantization_bit)
    types = (*weight_types(parsed), compute_type(parsed))
    return estimate_states(model, sharding, optimizer, *types, quantized=quantized)


def histories(rows: ConversationDataset, measures: np.ndarray, parsed: ParsedArguments) -> Iterator[Table]:
    """Yield a table of what each ``--history`` would train, if a conversation has several contexts."""
    others = [one for one in get_args(History) if one != rows.encoder.history]
    if rows.encoder.prompts or measures["rows"].sum() == measures["samples"].sum():
        return
    found: dict[str, np.ndarray] = {rows.encoder.history: measures}
    for history in others:
        other = ConversationDataset(rows.tables, replace(rows.encoder, history=history), skip_bad_samples=True)
        found[history] = measure_lengths(other, cache_folder(parsed.data.data_cache_dir)).measures
    yield describe_histories(found)


def decode_one_of_each(dataset: ConversationDataset) -> None:
    """Decode a sample of each dataset, as a worker would.

    Raises:
        UserError: A sample must stop the run, or none of the first rows of a dataset can be decoded.
    """
    for table in dataset.tables:
        single = ConversationDataset([table], dataset.encoder, dataset.skips_bad_samples)
        reasons: list[str] = []
        for index in range(min(_LOOKED_AT, len(single))):
            item = single[index]
            if item.error is not None:
                raise item.error
            if item.samples:
                break
            reasons += [event.message for event in item.events]
        else:
            raise UserError(
                f"None of the first {_LOOKED_AT} rows of {table.table.spec.name!r} can be used: {reasons[0]}"
            )


class _KeysOfRows(Dataset[list[str]]):
    """Messages about unread keys in a table's records; each index covers several rows, usable or not."""

    def __init__(self, table: SampledTable, encoder: SampleEncoder) -> None:
        self._table, self._encoder = table.table, encoder
        self._rows = np.unique(table.rows)

    def __len__(self) -> int:
        return -(-len(self._rows) // _ROWS_A_TASK)

    def __getitem__(self, index: int) -> list[str]:
        messages = dict[str, None]()
        for row in self._rows[index * _ROWS_A_TASK : (index + 1) * _ROWS_A_TASK].tolist():
            try:
                samples = self._table[row]
            except SampleError:  # training skips it, or it has stopped the run before
                continue
            messages |= dict.fromkeys(event.message for one in samples for event in self._encoder.unread_keys(one))
        return list(messages)


def name_unread_keys(dataset: ConversationDataset) -> None:
    """Warn about keys that nothing reads, in all rows; this takes less time than counting their tokens."""
    for table in dataset.tables:
        tasks = _KeysOfRows(table, dataset.encoder)
        found = in_processes(tasks, len(tasks), available_cores())
        for message in dict.fromkeys(itertools.chain.from_iterable(found)):
            logger.warning("%s.", message)


def require_room_on_disk(args: TrainingArguments, states: StateMemory, *, planned: bool = False) -> None:
    """Check that a checkpoint fits on the disk, and warn if ``--save_total_limit`` checkpoints do not.

    Args:
        args: Arguments of the training.
        states: Memory of its states.
        planned: Whether the run is for another machine, so that a disk that is too small is a warning.

    Raises:
        UserError: A single checkpoint does not fit.
    """
    assert args.output_dir is not None
    free = shutil.disk_usage(args.output_dir).free
    if states.checkpoint > free:
        message = (
            f"--output_dir {args.output_dir}: a checkpoint takes about {gib(states.checkpoint)}, and its disk has "
            f"{gib(free)} free. Choose another disk, or --save_only_model True."
        )
        if not planned:
            raise UserError(message)
        logger.warning("%s", message)
        return
    kept = args.save_total_limit
    if kept and (kept + 1) * states.checkpoint > free:
        logger.warning(
            "%d checkpoints of %s (--save_total_limit %d, and the one being saved) do not fit on the disk of %s, which "
            "has %s free.",
            *(kept + 1, gib(states.checkpoint), kept, args.output_dir, gib(free)),
        )


def warn_of_loading(states: StateMemory, sharding: StateSharding, total: int) -> None:
    """Warn if all ranks of a machine together do not have the memory to load their weights.

    Args:
        states: Memory of the model's state.
        sharding: Sharding over the devices.
        total: Host memory of the machine, in bytes.
    """
    here = min(sharding.ranks, int(os.environ.get("LOCAL_WORLD_SIZE", _DEVICES_A_MACHINE)))
    here = 1 if sharding.read_once else here
    needed = loading_bytes(states, sharding)
    if here * needed > total:
        once = ', or "cpu_ram_efficient_loading": true in a copy of configs/fsdp2.json, which reads them on one rank'
        logger.warning(
            "Loading takes %s of host memory on each rank that reads, %s on a machine of %d, and this one has %s. Use "
            "--deepspeed configs/zero3.json, which shards weights as they are read%s.",
            *(gib(needed), gib(here * needed), here, gib(total), "" if sharding.read_once else once),
        )


def measure_heaviest(
    model: PreTrainedModel, data: RunData, measures: np.ndarray, parsed: ParsedArguments
) -> StepMemory:
    """Return the memory of the micro-batch with most tokens or of that with most patches, whichever needs more.

    Raises:
        UserError: One of their samples must stop the run.
    """
    tokenizer: Any = data.processor.tokenizer
    collate = Collator(tokenizer.pad_token_id, parsed.data.data_flatten)
    size = parsed.training.train_batch_size
    heaviest = {tuple(np.argsort(-measures[name], kind="stable")[:size].tolist()) for name in ("tokens", "patches")}
    batches = [for_model(collate([data.train[index] for index in indices])) for indices in sorted(heaviest)]
    found = [measure_step(model, data.objective.prepare(batch), data.objective) for batch in batches]
    return max(found, key=lambda one: one.activations + one.logits)
