r"""Score the masks that a model trained by ``--task grounding`` predicts against those of a dataset.

    python tools/evaluate_masks.py --model_name_or_path MODEL --dataset_use NAMES [--known_use NAMES]

Prints the mean intersection over union (mIoU), that of all masks together (cIoU) and the share of masks with an IoU
above one half. With ``--known_use``, the training data, it also scores baselines that ignore the image: a mask of the
whole image, the mean box, the mean mask.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qwenvl.cli.data_args import chosen_datasets
from qwenvl.cli.inference_args import NOT_ASKED, AskArguments, open_asking_encoder
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.types import Sample
from qwenvl.tasks.grounding.baselines import Baselines
from qwenvl.tasks.grounding.masks import Mask
from qwenvl.tasks.grounding.metrics import MaskRecord, compare_masks, mask_metrics
from qwenvl.tasks.grounding.phrases import MaskReader
from qwenvl.tasks.grounding.predict import Grounder, open_grounder
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.evaluate_masks")

PAGE = HelpPage(
    "evaluate_masks.py --model_name_or_path MODEL --dataset_use NAMES [--known_use NAMES]",
    "Score the masks that a model trained by --task grounding predicts against those of a dataset: mIoU, cIoU, and the "
    "share with an IoU above one half.",
    NOT_ASKED | {"batch_size", "max_new_tokens", "temperature", "top_p", "seed"},
)


@dataclass
class MaskArguments(AskArguments):
    """Flags of this tool, besides those of the tools that ask a model."""

    known_use: str | None = field(
        default=None, metadata={"help": "Training data of the model: adds baselines that ignore the image."}
    )


def main(argv: list[str] | None = None) -> int:
    """Print the metrics; return the exit code."""
    setup_logging("info")
    try:
        arguments = parse_class(MaskArguments, sys.argv[1:] if argv is None else argv, PAGE)
        print_figures(evaluate_masks(arguments))
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def evaluate_masks(arguments: MaskArguments) -> dict[str, list[MaskRecord]]:
    """Return the comparisons with the annotated masks, by model or baseline.

    Raises:
        UserError: The folder or a sample cannot be used.
    """
    encoder = open_asking_encoder(arguments)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    grounder = open_grounder(arguments.model_name_or_path, base=arguments.base, device=arguments.device, dtype=dtype)
    if grounder.readout is None:
        raise UserError(f"{arguments.model_name_or_path} has not learned masks: train it by --task grounding.")
    reader = grounder.mask_reader(encoder)
    baselines = None
    if arguments.known_use is not None:
        known = replace(arguments, dataset_use=arguments.known_use)
        baselines = Baselines.of([mask for sample in _samples(known) for mask in _masks(sample, encoder, reader)])
    found: dict[str, list[MaskRecord]] = {arguments.model_name_or_path: []}
    for sample in _samples(arguments):
        for mask, pixels in zip(*_found(sample, encoder, grounder, reader), strict=True):
            found[arguments.model_name_or_path].append(compare_masks(pixels, mask.pixels()))
            for name, record in baselines.compare(mask).items() if baselines is not None else ():
                found.setdefault(name, []).append(record)
    return found


def print_figures(found: dict[str, list[MaskRecord]]) -> None:
    """Print a table of the metrics."""
    table = Table("masks", "mIoU", "cIoU", "above a half", "phrases")
    for name, records in found.items():
        metrics = mask_metrics(records)
        figures = (f"{metrics[one]:.3f}" for one in ("miou", "ciou", "acc_at_50"))
        table.add_row(name, *figures, str(len(records)))
    Console().print(table)


def _samples(arguments: MaskArguments) -> Iterator[Sample]:
    for table in open_tables(chosen_datasets(arguments), arguments.data_seed, arguments.data_cache_dir):
        for row in table.rows:
            yield from table.table[int(row)]


def _masks(sample: Sample, encoder: SampleEncoder, reader: MaskReader) -> list[Mask]:
    return [region.mask for plan in encoder.plans(sample) for region in reader.read(sample, plan)]


def _found(
    sample: Sample, encoder: SampleEncoder, grounder: Grounder, reader: MaskReader
) -> tuple[list[Mask], list[np.ndarray]]:
    """Return the annotated masks of a sample and the predicted ones."""
    media = encoder.reader(sample, keep_images=True)
    plan = encoder.plans(sample, media)[-1]
    regions = reader.read(sample, plan)
    places, sizes = [region.place for region in regions], [region.mask.size for region in regions]
    return [region.mask for region in regions], grounder.masks(encoder.encode([plan], sample, media)[0], places, sizes)
