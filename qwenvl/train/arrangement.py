"""Rows to what a run trains on: packs where asked for, in an order whose steps keep all ranks equally busy."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PretrainedConfig

from qwenvl.arguments import ParsedArguments, TrainingArguments
from qwenvl.data.collation import Event
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.lengths import measure_lengths
from qwenvl.data.packing import lower_bound
from qwenvl.data.sampling import SampleOrder, Sharding, costs_of_ranks, imbalance
from qwenvl.models.flops import Trained, training_flops
from qwenvl.utilities.cache import cache_folder
from qwenvl.utilities.families import Family

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrangement:
    """What a run trains on.

    Args:
        dataset: rows or packs.
        order: of its indices.
        events: what there is to report of the rows.
    """

    dataset: ConversationDataset
    order: SampleOrder
    events: tuple[Event, ...] = ()


def arrange(
    rows: ConversationDataset, parsed: ParsedArguments, config: PretrainedConfig, family: Family
) -> Arrangement:
    """Pack rows and balance steps, as far as the arguments ask for it. Every rank has to call it.

    Raises:
        UserError: a row must stop the run.
    """
    arguments, args = parsed.data, parsed.training
    seed = args.seed if args.data_seed is None else args.data_seed
    if not (arguments.data_packing or arguments.group_by_cost):
        return Arrangement(rows, SampleOrder(len(rows), seed))
    measured = measure_lengths(rows, cache_folder(arguments.data_cache_dir))
    switches = parsed.model
    trained = Trained(switches.tune_mm_vision, switches.tune_mm_mlp, switches.tune_mm_llm)
    flops = training_flops(config, family, trained)
    if not arguments.data_packing:
        padded = None if arguments.data_flatten else measured.measures["tokens"]
        order = SampleOrder(len(rows), seed, costs=flops.count(measured.measures), lengths=padded)
        _log_balance(order, args)
        return Arrangement(rows, order, measured.events)
    tokens, limit = measured.measures["tokens"], args.model_max_length
    packs = rows.packed(tokens, 0 if args.data_seed is None else args.data_seed)
    fewest, fill = lower_bound(tokens, limit), int(tokens.sum()) / (len(packs) * limit)
    logger.info("Packs: %d of up to %d tokens, %.2f%% full; no fewer than %d.", len(packs), limit, 100 * fill, fewest)
    order = SampleOrder(len(packs), seed, costs=flops.count(packs.add_up(measured.measures)))
    _log_balance(order, args)
    return Arrangement(packs, order, measured.events)


def _log_balance(order: SampleOrder, args: TrainingArguments) -> None:
    """Say what the order of steps gains, where ranks wait for each other."""
    if args.world_size == 1 or order.costs is None:
        return
    sharding = Sharding(args.train_batch_size, args.world_size, 0, args.gradient_accumulation_steps)
    ours, random = (
        imbalance(costs_of_ranks(order.costs, one.steps(0, sharding.step_size), sharding))
        for one in (order, SampleOrder(order.num_samples, order.seed))
    )
    logger.info("Balance: the slowest rank has %.3f times the work of the mean; %.3f in random order.", ours, random)
