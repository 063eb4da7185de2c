"""Write a quantized copy of a trained model, checked on held-out samples against the model that it was made from.

    python tools/export.py --to fp8 --model_name_or_path output/apples --output output/apples-fp8 --dataset_use charts

fp8: the form of Qwen's published FP8 checkpoints, by transformers; half the size of bfloat16. The copy is opened again,
answers held-out samples, and the unquantized model says how likely it finds each token of these answers. The figures
are printed and stand in the copy's model card. With --max_difference, a copy that differs by more is not kept.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qwenvl.cli.data_args import chosen_datasets
from qwenvl.cli.export.card import write_card
from qwenvl.cli.export.check import Difference, answer, difference
from qwenvl.cli.export.fp8 import require_quantizable, write_fp8
from qwenvl.cli.inference_args import NOT_ASKED, AskArguments, open_asking_encoder, open_model
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import open_processor
from qwenvl.inference.generate import ChatModel, default_device
from qwenvl.inference.prompts import EvalExample, open_example
from qwenvl.models.loading import load_model
from qwenvl.models.lora.files import CONFIG_FILE
from qwenvl.models.precision import read_dtype
from qwenvl.models.quantization import quantization_method
from qwenvl.tasks.registry import saved_predictor
from qwenvl.utils.errors import SampleError, UserError
from qwenvl.utils.logging import setup_logging
from qwenvl.utils.permissions import follow_umask

logger = logging.getLogger("qwenvl.export")

PAGE = HelpPage(
    "export.py --to fp8 --model_name_or_path FOLDER --output DIR --dataset_use NAMES [--flag VALUE ...]",
    "Write a quantized copy of a trained model, checked on held-out samples against the model that it was made from: "
    "its answers, and the log-probabilities of their tokens. The figures stand in its model card.",
    NOT_ASKED | {"base", "batch_size", "temperature", "top_p", "seed"},
)
_COPIED = (".json", ".jinja", ".txt", ".yaml", ".model")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "trainer_state.json")


@dataclass
class ExportArguments(AskArguments):
    """Flags of this tool, besides those of the tools that ask a model."""

    to: Literal["fp8"] | None = field(default=None, metadata={"help": "Form of the copy."})
    output: str = field(default="", metadata={"help": "Folder to write; it must be new or empty."})
    samples: int = field(default=32, metadata={"help": "Held-out samples to compare, evenly spread; 0 for all."})
    max_difference: float | None = field(
        default=None,
        metadata={
            "help": "Largest accepted mean difference of a token's log-probability, in nats: a copy above it is not "
            "kept. Default: no limit, as none suits every model; judge the reported figures."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to is None or not self.output:
            raise UserError("Name the form and the folder of the copy: --to fp8 --output DIR.")
        if self.samples < 0 or (self.max_difference is not None and self.max_difference <= 0):
            raise UserError("--samples must be 0 or more, and --max_difference above 0.")


def main(argv: Sequence[str] | None = None) -> int:
    """Export and check; return the exit code."""
    setup_logging("info")
    try:
        run(parse_class(ExportArguments, sys.argv[1:] if argv is None else argv, PAGE))
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def run(arguments: ExportArguments) -> None:
    """Write the copy, compare it, and keep it if it is close enough.

    Raises:
        UserError: Something in the input must be changed, or the copy differs too much.
    """
    folder, output = Path(arguments.model_name_or_path), Path(arguments.output)
    require_exportable(folder)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} already holds files. Choose another folder, or empty it.")
    encoder = open_asking_encoder(arguments)
    examples = list(held_out(arguments, encoder))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        copy = Path(scratch) / output.name
        copy.mkdir()
        count = write_fp8(folder, copy)
        copy_files(folder, copy)
        logger.info("Quantized %d weights; comparing the copy with %s on %d samples.", count, folder, len(examples))
        found = compare(arguments, encoder, examples, copy)
        for name, value in found.lines():
            logger.info("%s: %s", name, value)
        require_close(found, arguments.max_difference)
        write_card(folder, copy, output, arguments.dataset_use or str(arguments.annotation_path), found)
        follow_umask(copy)
        if output.exists():
            output.rmdir()
        copy.rename(output)
    logger.info("Saved to %s.", output)


def require_close(found: Difference, limit: float | None) -> None:
    """Refuse a copy that differs by more than the user accepts, or whose log-probabilities are no numbers.

    Raises:
        UserError: It is not to be kept.
    """
    if not math.isfinite(found.mean):
        raise UserError("Log-probabilities of the copy or of the model are not finite: the copy is not kept.")
    if limit is not None and found.mean > limit:
        raise UserError(
            f"The log-probabilities of the copy's tokens differ by {found.mean:.3g} nats on average, more than "
            f"--max_difference {limit:g}: it is not kept."
        )


def require_exportable(folder: Path) -> None:
    """Refuse folders that are not whole models of words, or not of a family that was tried.

    Raises:
        UserError: It is such a folder.
    """
    if (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds adapters: merge them (tools/merge_lora.py) and export the merged folder.")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model_name_or_path {folder} is no folder of a model: it has no config.json.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if method := quantization_method(config):
        raise UserError(f"{folder} is quantized already ({method}).")
    if saved_predictor(str(folder)) is not None:
        raise UserError(f"{folder} has the head of a task, which no server reads; it is not exported.")
    require_quantizable(config, str(folder))


def held_out(arguments: ExportArguments, encoder: SampleEncoder) -> Iterator[EvalExample]:
    """Yield the samples to compare; unusable ones are left out with a warning.

    Raises:
        UserError: No sample can be used.
    """
    tables = open_tables(chosen_datasets(arguments), arguments.data_seed, arguments.data_cache_dir)
    rows = [(table, int(row)) for table in tables for row in table.rows]
    count = min(arguments.samples or len(rows), len(rows))
    usable = 0
    for place in np.linspace(0, len(rows) - 1, count).round().astype(int).tolist():
        table, row = rows[place]
        try:
            yield from [open_example(sample, encoder) for sample in table.table[row]]
            usable += 1
        except SampleError as error:
            logger.warning("Left out: %s", error)
    if not usable:
        raise UserError("None of the held-out samples can be used, so that there is nothing to compare.")


def compare(
    arguments: ExportArguments, encoder: SampleEncoder, examples: Sequence[EvalExample], copy: Path
) -> Difference:
    """Ask the copy and then the whole model, one at a time in memory.

    Raises:
        UserError: One of them cannot be opened, or they were asked other prompts.
    """
    tokens = arguments.max_new_tokens
    quantized = open_dequantized(arguments, encoder, copy)
    heard = [answer(quantized, example.prompt, tokens) for example in examples]
    del quantized
    return difference(examples, heard, open_model(arguments, encoder), tokens)


def open_dequantized(arguments: ExportArguments, encoder: SampleEncoder, copy: Path) -> ChatModel:
    """Open the FP8 copy with dequantized weights, which any device computes with.

    Raises:
        UserError: It cannot be opened.
    """
    dtype = read_dtype(str(copy)) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model: Any = load_model(str(copy), dtype=dtype, attn_implementation="sdpa")
    return ChatModel(
        model.to(arguments.device or default_device()).eval(), open_processor(str(copy)), encoder.template.kwargs
    )


def copy_files(folder: Path, copy: Path) -> None:
    """Copy the processor, the template and the records."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and file.name not in _NOT_COPIED:
            shutil.copy2(file, copy)
