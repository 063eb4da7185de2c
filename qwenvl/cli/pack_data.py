r"""Plan packs before training: groups of samples that share a row of up to ``--model_max_length`` tokens.

    python tools/pack_data.py --dataset_use "a%50,b" --model_name_or_path MODEL --model_max_length 8192 \
        --output plan.parquet [--format plan|official] [--report report.json]

Takes the data flags of training (``--max_pixels``, ``--video_fps``, ``--overlength``, ...) with the same defaults; give
the values of the run. ``plan`` is for ``--packing_plan`` of this trainer. ``official`` is the packed JSON of the
official recipe, to be registered as a dataset and trained on with ``--data_packing True``. Lengths are exact, without
decoding media; they are cached, so that a later call measures new rows only.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from qwenvl.cli.data_args import TRAINING_ALONE, ToolArguments, chosen_datasets, family_and_config
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.bin_packing import lower_bound
from qwenvl.data.dataset import ConversationDataset, open_tables, split_tables
from qwenvl.data.encoding.processor import add_tokens, build_encoder, describe_limits, open_processor
from qwenvl.data.media.video.decode import prepare_backend
from qwenvl.data.packing.lengths import measure_lengths
from qwenvl.data.packing.official_json import write_packed_json
from qwenvl.data.packing.plan import PackPlan, make_plan, write_plan
from qwenvl.data.sampler import SampleOrder, Sharding, costs_of_ranks, imbalance
from qwenvl.profiling.flops import Flops, Trained, training_flops
from qwenvl.utils.cache import cache_folder
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.pack_data")

PAGE = HelpPage(
    "pack_data.py --model_name_or_path MODEL --dataset_use NAMES --model_max_length N --output FILE [--flag VALUE ...]",
    "Plan packs of samples before training, from exact lengths that need no decoding. Give the data flags of training.",
    TRAINING_ALONE - {"eval_ratio", "on_bad_sample"},
)


@dataclass
class PackArguments(ToolArguments):
    """Flags of this tool, besides those of all tools."""

    model_max_length: int = field(default=0, metadata={"help": "Most tokens of a pack, as in training. Required."})
    data_seed: int | None = field(default=None, metadata={"help": "As in training."})
    output: str = field(default="", metadata={"help": "File to write. Required."})
    format: Literal["plan", "official"] = field(
        default="plan",
        metadata={
            "help": "plan: Parquet, for packing_plan. official: packed JSON (.json or .jsonl) of the official tool."
        },
    )
    report: str | None = field(default=None, metadata={"help": "Write the statistics to this JSON file as well."})
    world_size: int = field(default=8, metadata={"help": "Number of ranks for which the balance is computed."})
    num_workers: int | None = field(default=None, metadata={"help": "Measuring processes. Default: one per core."})
    tune_mm_vision: bool = field(default=True, metadata={"help": "As in training; only used to estimate costs."})
    tune_mm_mlp: bool = field(default=True, metadata={"help": "As in training; only used to estimate costs."})
    tune_mm_llm: bool = field(default=True, metadata={"help": "As in training; only used to estimate costs."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_name_or_path", "model_max_length", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing. --help lists all flags.")
        if self.model_max_length < 2 or self.world_size < 1:
            raise UserError("--model_max_length must be 2 or more, and --world_size 1 or more.")
        if self.format == "official" and Path(self.output).suffix not in (".json", ".jsonl"):
            raise UserError(f"--output {self.output}: --format official writes .json or .jsonl files.")


def main(argv: list[str] | None = None) -> int:
    """Plan packs, write them and print the statistics; return the exit code."""
    setup_logging("info")
    try:
        pack_data(parse_class(PackArguments, sys.argv[1:] if argv is None else argv, PAGE))
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def pack_data(arguments: PackArguments) -> dict[str, Any]:
    """Plan packs, write them, and print and return the statistics.

    Raises:
        UserError: Data or checkpoint cannot be used, or a file cannot be written.
    """
    started = time.monotonic()
    rows, flops = open_rows(arguments)
    lengths = measure_lengths(rows, cache_folder(arguments.data_cache_dir), arguments.num_workers)
    counted = time.monotonic()
    seed = arguments.data_seed or 0
    plan = make_plan(rows, lengths, seed)
    packed = time.monotonic()
    if not len(plan.packs):
        raise UserError("No row is left to pack: all are left out. tools/check_image.py says what is wrong with them.")
    output = Path(arguments.output)
    if arguments.format == "plan":
        write_plan(output, plan, rows, flops.count(plan.measures), seed)
        advice = f"Train with --packing_plan {output}"
    else:
        entry = {
            "annotation_path": str(output.resolve()),
            "data_path": write_packed_json(output, rows.packed(plan.packs)),
        }
        advice = f"Register {entry} and train with --data_packing True"
    seconds = {"counting": counted - started, "packing": packed - counted, "writing": time.monotonic() - packed}
    figures = {
        "output": str(output),
        "format": arguments.format,
        **figures_of(plan, rows, arguments),
        "balance": balance_of(plan, flops, arguments.world_size),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    if arguments.report is not None:
        _write_report(Path(arguments.report), figures)
    print_figures(figures)
    logger.info("%s.", advice)
    return figures


def open_rows(arguments: PackArguments) -> tuple[ConversationDataset, Flops]:
    """Open the rows that training would use, and the counter of their FLOPs.

    Raises:
        UserError: Checkpoint, registry or annotations cannot be used.
    """
    processor = open_processor(arguments.model_name_or_path)
    add_tokens(processor, arguments.additional_tokens or ())
    family, config = family_and_config(arguments, processor)
    encoder = build_encoder(processor, config, family, arguments, arguments.model_max_length)
    prepare_backend()
    seed = arguments.data_seed or 0
    tables = open_tables(chosen_datasets(arguments), seed, arguments.data_cache_dir)
    if arguments.eval_ratio:
        tables, _ = split_tables(tables, arguments.eval_ratio, seed)
    trained = Trained(arguments.tune_mm_vision, arguments.tune_mm_mlp, arguments.tune_mm_llm)
    rows = ConversationDataset(tables, encoder, arguments.on_bad_sample == "skip")
    return rows, training_flops(config, family, trained)


def figures_of(plan: PackPlan, rows: ConversationDataset, arguments: PackArguments) -> dict[str, Any]:
    """Return the statistics of the packs, their fill and the left-out samples."""
    tokens, limit = plan.measures["tokens"], arguments.model_max_length
    left_out = Counter(event.record["category"] for event in plan.events if event.record)
    other = Counter(event.kind for event in plan.events if not event.record)
    return {
        "model_max_length": limit,
        "limits": describe_limits(rows.encoder.settings),
        "rows": len(rows),
        "samples": int(plan.measures["samples"].sum()),
        "tokens": int(tokens.sum()),
        "trained_tokens": int(plan.measures["trained_tokens"].sum()),
        "patches": int(plan.measures["patches"].sum()),
        "longest": int(tokens.max()),
        "packs": len(plan.packs),
        "lower_bound": lower_bound(tokens, limit),
        "fill": int(tokens.sum()) / (len(plan.packs) * limit),
        "left_out": dict(sorted(left_out.items())),
        "reported": dict(sorted(other.items())),
    }


def balance_of(plan: PackPlan, flops: Flops, world_size: int) -> dict[str, Any]:
    """Return the cost of the slowest rank relative to the mean, for one pack per rank and step."""
    costs = flops.count(plan.packs.add_up(plan.measures))
    sharding = Sharding(1, world_size)
    orders = {
        "slowest_over_mean": SampleOrder(len(costs), costs=costs),
        "slowest_over_mean_in_random_order": SampleOrder(len(costs)),
    }
    ratios = {
        name: imbalance(costs_of_ranks(costs, order.steps(0, sharding.step_size), sharding))
        for name, order in orders.items()
    }
    return {"world_size": world_size, **ratios}


def _write_report(path: Path, figures: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report {path} cannot be written: {error.strerror or error}.") from error


def print_figures(figures: dict[str, Any]) -> None:
    """Print the statistics as a table."""
    balance = figures["balance"]
    table = Table(title=f"Packs in {figures['output']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("rows", "samples", "tokens", "trained_tokens", "patches", "longest"):
        table.add_row(name.replace("_", " "), f"{figures[name]:,}", end_section=name == "longest")
    table.add_row("packs", f"{figures['packs']:,}")
    table.add_row("no fewer than", f"{figures['lower_bound']:,}")
    table.add_row("fill", f"{figures['fill']:.2%}", end_section=True)
    for category, count in {**figures["left_out"], **figures["reported"]}.items():
        what = f"left out: {category}" if category in figures["left_out"] else category
        table.add_row(what.replace("_", " "), f"{count:,}")
    table.add_section()
    table.add_row(f"slowest of {balance['world_size']} ranks over mean", f"{balance['slowest_over_mean']:.3f}")
    table.add_row("... in random order", f"{balance['slowest_over_mean_in_random_order']:.3f}", end_section=True)
    for name, seconds in figures["seconds"].items():
        table.add_row(f"seconds of {name}", f"{seconds:.1f}")
    Console().print(table)
