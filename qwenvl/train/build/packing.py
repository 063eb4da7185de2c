"""Pack the training rows if requested, and order them so that all ranks have about equal work in each step."""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from qwenvl.config import DataArguments, ParsedArguments
from qwenvl.data.bin_packing import lower_bound
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import Event
from qwenvl.data.packing.lengths import measure_lengths
from qwenvl.data.packing.plan import PackPlan, cached_plan_path, make_plan, read_plan, used_datasets, write_plan
from qwenvl.data.sampler import SampleOrder
from qwenvl.families import Family
from qwenvl.profiling.flops import Flops, Trained, training_flops
from qwenvl.utils.cache import cache_folder
from qwenvl.utils.distributed import from_main_process, is_main_process
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

_NOT_OF_A_PLAN = (
    *("data_flatten", "data_packing", "packing_plan", "group_by_cost", "eval_dataset_use", "base_interval"),
    "save_processor_limits",
)


@dataclass(frozen=True)
class PackFigures:
    """Figures of a packing.

    Args:
        count: Number of packs.
        limit: Largest number of tokens in a pack.
        fill: Share of that capacity in use, 0 to 1.
        fewest: Lower bound of the number of packs for these rows.
        source: File that the plan was read from; None if it was made now.
    """

    count: int
    limit: int
    fill: float
    fewest: int
    source: Path | None


@dataclass(frozen=True)
class Arrangement:
    """Training data of a run, packed or not, and their order.

    Args:
        dataset: Dataset of rows or packs.
        order: Order of its indices.
        events: Events of the rows, for the report.
        measures: Array of :data:`~qwenvl.data.sample_stats.MEASURES`, one element per row; None if not needed.
        packs: Figures of the packing; None without packing.
    """

    dataset: ConversationDataset
    order: SampleOrder
    events: tuple[Event, ...] = ()
    measures: np.ndarray | None = None
    packs: PackFigures | None = None


def arrange(
    rows: ConversationDataset, parsed: ParsedArguments, config: PretrainedConfig, family: Family
) -> Arrangement:
    """Pack rows and balance steps, if the arguments request it. Every rank must call it.

    Raises:
        UserError: A row must stop the run, or a plan was made for other rows.
    """
    arguments, args = parsed.data, parsed.training
    seed = args.seed if args.data_seed is None else args.data_seed
    switches = parsed.model
    adapters = dict.fromkeys(parsed.adapters.adapted_parts, 0)
    tuned = (switches.tune_mm_vision, switches.tune_mm_mlp, switches.tune_mm_llm)
    trained = Trained(*tuned, adapters, switches.train_mtp)
    flops = training_flops(config, family, trained)
    if arguments.data_packing:
        plan, source = _plan(rows, parsed, flops)
        dataset = rows.packed(plan.packs)
        order = SampleOrder(len(dataset), seed, costs=flops.count(plan.packs.add_up(plan.measures)))
        return Arrangement(dataset, order, plan.events, plan.measures, _figures(plan, rows.encoder.max_length, source))
    if arguments.group_by_cost:
        lengths = measure_lengths(rows, cache_folder(arguments.data_cache_dir))
        padded = None if arguments.data_flatten else lengths.measures["tokens"]
        order = SampleOrder(len(rows), seed, costs=flops.count(lengths.measures), lengths=padded)
        return Arrangement(rows, order, lengths.events, lengths.measures)
    return Arrangement(rows, SampleOrder(len(rows), seed))


def _plan(rows: ConversationDataset, parsed: ParsedArguments, flops: Flops) -> tuple[PackPlan, Path | None]:
    """Return (plan, its file): the named plan, one kept from an earlier run, or a new one, which has no file."""
    cache = cache_folder(parsed.data.data_cache_dir)
    seed = 0 if parsed.training.data_seed is None else parsed.training.data_seed
    kept = cached_plan_path(cache, rows, seed)
    plan = from_main_process(lambda: _read(rows, parsed, kept))
    source = None if plan is None else Path(parsed.data.packing_plan or kept)
    if plan is None:
        plan = make_plan(rows, measure_lengths(rows, cache), seed)
        # A plan with unusable samples is not kept, so that the next run tries them again.
        if is_main_process() and not any(event.kind == "bad" for event in plan.events):
            _keep(kept, plan, rows, flops.count(plan.measures), seed)
    if not len(plan.packs):
        raise UserError("No row is left to pack: all are left out. tools/check_image.py says what is wrong with them.")
    return plan, source


def _figures(plan: PackPlan, limit: int, source: Path | None) -> PackFigures:
    tokens, count = plan.measures["tokens"], len(plan.packs)
    return PackFigures(count, limit, int(tokens.sum()) / (count * limit), lower_bound(tokens, limit), source)


def _read(rows: ConversationDataset, parsed: ParsedArguments, kept: Path) -> PackPlan | None:
    remake = pack_command(rows, parsed)
    if parsed.data.packing_plan is not None:
        return read_plan(Path(parsed.data.packing_plan), rows, remake)
    if not kept.exists():
        return None
    try:
        return read_plan(kept, rows, remake)
    except UserError as error:
        logger.warning("A plan kept from an earlier run is made anew: %s", error)
        return None


def _keep(path: Path, plan: PackPlan, rows: ConversationDataset, costs: np.ndarray, seed: int) -> None:
    try:
        write_plan(path, plan, rows, costs, seed)
    except UserError as error:
        logger.warning("The next run has to plan again: %s", error)


def pack_command(rows: ConversationDataset, parsed: ParsedArguments) -> str:
    """Return the command line that makes a plan of a run's data."""
    names = [field.name for field in fields(DataArguments) if field.name not in _NOT_OF_A_PLAN]
    wanted = ("model_name_or_path", "model_max_length", "data_seed", *names)
    values = {name: parsed.given[name] for name in wanted if name in parsed.given}
    values.setdefault("dataset_use", used_datasets(rows))
    values["model_max_length"] = parsed.training.model_max_length
    values["output"] = parsed.data.packing_plan or "plan.parquet"
    command = ["python", "tools/pack_data.py"]
    for name, value in values.items():
        command += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join(command)
