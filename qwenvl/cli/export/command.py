"""Write a quantized copy of a trained model, checked on held-out samples against the model that it was made from.

    python tools/export.py --to fp8 --model_name_or_path output/apples --output output/apples-fp8 --dataset_use charts

fp8: the form of Qwen's published FP8 checkpoints, by transformers; half the size of bfloat16. gguf: files for
llama.cpp, by its converter, which --llama_cpp names. The copy is opened again, by transformers or by the server of
llama.cpp, and answers held-out samples; the unquantized model says how likely it finds each token of these answers. The
figures are printed and stand in the model card. With --max_difference, a copy that differs by more is not kept.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl.cli.data_args import chosen_datasets
from qwenvl.cli.export.arguments import PAGE, ExportArguments
from qwenvl.cli.export.card import Described, write_card
from qwenvl.cli.export.check import Difference, Heard, answer, difference, require_same_prompts
from qwenvl.cli.export.forms import FORMS, Form
from qwenvl.cli.inference_args import open_asking_encoder, open_model
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.inference.prompts import EvalExample, open_example
from qwenvl.models.lora.files import CONFIG_FILE
from qwenvl.models.quantization import quantization_method
from qwenvl.tasks.registry import saved_predictor
from qwenvl.utils.errors import SampleError, UserError
from qwenvl.utils.logging import setup_logging
from qwenvl.utils.permissions import follow_umask

logger = logging.getLogger("qwenvl.export")


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
    form: Form = FORMS[str(arguments.to)](arguments)
    form.require(exportable_config(folder))
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} already holds files. Choose another folder, or empty it.")
    encoder = open_asking_encoder(arguments)
    examples = form.fitting(list(held_out(arguments, encoder)))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        copy = Path(scratch) / output.name
        copy.mkdir()
        form.write(encoder, copy)
        logger.info("Comparing the copy with %s on %d samples.", folder, len(examples))
        found = compare(arguments, encoder, examples, form.ask(encoder, copy, examples))
        show(found)
        require_close(next(iter(found.values())), arguments.max_difference)
        samples = arguments.dataset_use or str(arguments.annotation_path)
        write_card(
            folder, copy, output, Described(str(arguments.to), form.suffix, form.about(encoder, output)), samples, found
        )
        follow_umask(copy)
        if output.exists():
            output.rmdir()
        copy.rename(output)
    logger.info("Saved to %s.", output)


def show(found: Mapping[str, Difference]) -> None:
    """Say the figures of each way of asking."""
    for way, one in found.items():
        for name, value in one.lines():
            logger.info("%s%s: %s", f"{way}: " if len(found) > 1 else "", name, value)


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


def exportable_config(folder: Path) -> dict[str, Any]:
    """Return the config of a folder, which has to be that of a whole model that answers in words.

    Raises:
        UserError: It is such a folder.
    """
    if (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds adapters: merge them (tools/merge_lora.py) and export the merged folder.")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model_name_or_path {folder} is no folder of a model: it has no config.json.")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if method := quantization_method(config):
        raise UserError(f"{folder} is quantized already ({method}).")
    if saved_predictor(str(folder)) is not None:
        raise UserError(f"{folder} has the head of a task, which no server reads; it is not exported.")
    return config


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
    arguments: ExportArguments,
    encoder: SampleEncoder,
    examples: Sequence[EvalExample],
    heard: Mapping[str, Sequence[Heard]],
) -> dict[str, Difference]:
    """Compare answers of the copy, by the way it was asked, with the whole model.

    Raises:
        UserError: The model cannot be opened, or was asked other prompts in the first way.
    """
    whole = open_model(arguments, encoder)
    own = [answer(whole, example.prompt, arguments.max_new_tokens) for example in examples]
    require_same_prompts(next(iter(heard.values())), own)
    return {way: difference(examples, answers, own, whole) for way, answers in heard.items()}
