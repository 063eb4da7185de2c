"""Say which settings train a model on given GPUs: engine, memory by part, steps, hours, and the command to copy.

    python tools/advise.py --model CONFIG --gpus 8xH100-80G --dataset_use X

CONFIG is a checkpoint's folder, a config.json alone, or the name of a published model. No weights are read and no GPU
is needed. Without --dataset_use the figures are those of an assumed mixture; see docs/scaling.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from qwenvl.cli.advise.candidates import command_line
from qwenvl.cli.advise.choice import Advice, Limits, choose
from qwenvl.cli.advise.estimate import Estimate, Estimator
from qwenvl.cli.advise.workload import SAMPLE
from qwenvl.config import DataArguments
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.families import get_family
from qwenvl.models.loading import read_trainable
from qwenvl.profiling.device_specs import GpuSet, parse_gpus
from qwenvl.train.dry_run.report import gib
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging
from qwenvl.utils.tables import as_text, table

logger = logging.getLogger("qwenvl.advise")

PAGE = HelpPage(
    "advise.py --model CONFIG --gpus 8xH100-80G [--dataset_use NAMES] [--flag VALUE ...]",
    "Say which settings train a model on given GPUs, with memory by part, steps, hours and the command to copy. Give "
    "the data flags of training.",
    {"data_flatten", "data_packing", "packing_plan", "base_interval"},
)
_SHORT = {
    "activations of the heaviest batch": "activations",
    "16-bit copies of weights, buffers": "buffers",
    "more than these three, in the optimizer's step": "step",
}
"""Headings of the parts of memory whose names are long."""


@dataclass
class AdviseArguments(DataArguments):
    """Flags of this tool, besides the data flags of training."""

    model: str = field(
        default="", metadata={"help": "Checkpoint's folder, config.json, or name of a published model. Required."}
    )
    gpus: str = field(default="", metadata={"help": "Number, kind and memory: 8xH100-80G, 1xL4, 64xH200. Required."})
    processor: str | None = field(
        default=None, metadata={"help": "Folder with the processor, where model is a config.json alone."}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "Name of the model in the printed commands. Default: model."}
    )
    mfu: float = field(default=0.4, metadata={"help": "Assumed share of the GPUs' peak, 0 to 1, for the hours."})
    tokens: float = field(
        default=1e8, metadata={"help": "Tokens of an epoch of the assumed mixture, where no dataset_use is given."}
    )
    model_max_length: int = field(default=8192, metadata={"help": "Tokens of a pack; shorter ones if they do not fit."})
    step_tokens: int = field(default=2**18, metadata={"help": "Tokens of an optimizer step over all GPUs, about."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "As in training."})
    output_dir: str = field(default="output/my_run", metadata={"help": "Output folder in the printed commands."})
    reserve: float = field(
        default=4.0,
        metadata={"help": "GiB of each GPU kept free for libraries and fragmentation."},
    )
    host_memory: float = field(
        default=128.0, metadata={"help": "GiB of host memory for each GPU, the limit of what is offloaded."}
    )
    machine: int = field(default=8, metadata={"help": "GPUs of one machine."})
    options: int = field(default=2, metadata={"help": "Settings to show for each kind of training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "gpus"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing. --help lists all flags.")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu:g} must be above 0 and at most 1.")
        for name in ("tokens", "step_tokens", "num_train_epochs", "host_memory", "machine", "options"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name):g} must be above 0.")
        if self.model_max_length < SAMPLE and not self.dataset_use:
            raise UserError(f"--model_max_length {self.model_max_length} must be {SAMPLE} or more.")
        if self.reserve < 0:
            raise UserError(f"--reserve {self.reserve:g} must be 0 or more.")


def main(argv: Sequence[str] | None = None) -> int:
    """Print settings; return the exit code."""
    setup_logging("warning")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # each candidate would repeat its remarks
    try:
        arguments = parse_class(AdviseArguments, sys.argv[1:] if argv is None else argv, PAGE)
        sys.stdout.write(describe(arguments, advise(arguments)) + "\n")
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def advise(arguments: AdviseArguments) -> Advice:
    """Return the best settings of each kind of training.

    Raises:
        UserError: Model, GPUs or data cannot be used.
    """
    return choose(open_estimator(arguments), limits_of(arguments))


def open_estimator(arguments: AdviseArguments) -> Estimator:
    """Return the estimator of a model and its data.

    Raises:
        UserError: The model cannot be used.
    """
    assumed = None if arguments.dataset_use else arguments.tokens
    return Estimator(read_config(arguments.model), _common(arguments, _source(arguments)), assumed)


def limits_of(arguments: AdviseArguments) -> Limits:
    """Return what settings may take.

    Raises:
        UserError: The GPUs are not known.
    """
    reserve, host = (int(size * 2**30) for size in (arguments.reserve, arguments.host_memory))
    lengths = arguments.model_max_length, arguments.step_tokens
    return Limits(parse_gpus(arguments.gpus), arguments.mfu, *lengths, reserve, host, arguments.options)


def read_config(model: str) -> PretrainedConfig:
    """Read the config of a folder, a file or a published model.

    Raises:
        UserError: There is none, or its family or quantization cannot be trained.
    """
    path = Path(model)
    if path.is_file():
        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {model} is no config.json of a model: {error}") from error
    else:
        read_trainable(model, adapted=True)
        config = AutoConfig.from_pretrained(model)
    get_family(config.model_type)
    return config


def _source(arguments: AdviseArguments) -> str:
    """Return the folder or repository of the processor.

    Raises:
        UserError: Data are named, and there is only a config.
    """
    path = Path(arguments.model)
    if arguments.processor or not arguments.dataset_use or not path.is_file():
        return arguments.processor or arguments.model
    if (path.parent / "tokenizer_config.json").is_file():
        return str(path.parent)
    raise UserError(
        f"--model {path} is a config alone, and --dataset_use needs a tokenizer to count tokens. Add --processor "
        "DIR, a folder with the processor of the same family, or leave --dataset_use out for an assumed mixture."
    )


def _common(arguments: AdviseArguments, source: str) -> dict[str, Any]:
    """Return the flags that all candidates share."""
    data = {one.name: getattr(arguments, one.name) for one in fields(DataArguments)}
    defaults = DataArguments()
    changed = {name: value for name, value in data.items() if value != getattr(defaults, name)}
    return {
        "model_name_or_path": source,
        "dataset_use": "my_dataset",
        **changed,
        "num_train_epochs": arguments.num_train_epochs,
        "output_dir": arguments.output_dir,
    }


def describe(arguments: AdviseArguments, advice: Advice) -> str:
    """Return tables, commands and what would fit, as text."""
    limits = limits_of(arguments)
    chosen = [estimate for estimates in advice.fitting.values() for estimate in estimates]
    parts: list[Table | str] = []
    if chosen:
        parts.append(_table(limits.gpus, arguments, chosen))
        parts += [f"({number}) {command_of(arguments, one)}" for number, one in enumerate(chosen, 1)]
    parts += [f"{kind}: does not fit. What would: {what}." for kind, what in advice.missing.items()]
    return as_text(*parts, _assumptions(limits, arguments), stream=sys.stdout)


def command_of(arguments: AdviseArguments, estimate: Estimate) -> str:
    """Return the command line of settings."""
    named = {"model_name_or_path": arguments.checkpoint or arguments.model}
    flags = estimate.candidate.flags({**_common(arguments, ""), **named})
    return command_line(flags, estimate.candidate.gpus, arguments.machine)


def _table(gpus: GpuSet, arguments: AdviseArguments, chosen: Sequence[Estimate]) -> Table:
    parts = [*dict.fromkeys(name for one in chosen for name in one.parts)]
    names = [_SHORT.get(name, name) for name in parts]
    headings = [
        "",
        "trains",
        "engine",
        "checkpointing",
        "pack",
        "accumulation",
        *names,
        "all",
        "host",
        "steps",
        "hours",
    ]
    rows = []
    for number, one in enumerate(chosen, 1):
        candidate = one.candidate
        settings = [candidate.kind, candidate.engine.name, "on" if candidate.recompute else "off"]
        sizes = [f"{size / 2**30:,.1f}" for size in (*(one.parts.get(name, 0) for name in parts), one.all, one.host)]
        lengths = [f"{candidate.pack:,}", str(candidate.accumulation)]
        rows.append([str(number), *settings, *lengths, *sizes, f"{one.steps:,}", f"{one.hours:.3g}"])
    title = f"{arguments.model} on {gpus.count} x {gpus.name}, GiB on each of {gpus.memory} GB"
    return table(title, headings, rows, words=(1, 2, 3))


def _assumptions(limits: Limits, arguments: AdviseArguments) -> str:
    data = "your data"
    if not arguments.dataset_use:
        data = f"a mixture of {arguments.tokens:,.0f} tokens (--tokens), half of them of images and a quarter trained"
    return (
        f"Hours assume {arguments.mfu:.0%} (--mfu) of {limits.gpus.peak / 1e12:g} TFLOP/s, and {data}. Settings fit "
        f"if they take at most {gib(limits.room)} of a GPU (--reserve {arguments.reserve:g} GiB is kept free) and "
        f"{arguments.host_memory:g} GiB of host memory for each GPU (--host_memory). Add --dry_run to a command for "
        "its full report."
    )
