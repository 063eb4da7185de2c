r"""Write a site that shows samples as the model gets them, and statistics of their datasets.

    python tools/view_data.py --dataset_use "a%50,b" --model_name_or_path MODEL --output view
    python tools/view_data.py --annotation_path FILE --data_path DIR --model_name_or_path MODEL --output view

Open ``view/index.html`` in a browser: there is no server, and nothing is loaded from a network. Takes the data flags of
training (``--max_pixels``, ``--video_fps``, ``--overlength``, ...) with the same defaults; give the values of the run.
With ``--model_max_length N --data_packing True`` the packs are shown as well.

Of large datasets ``--limit`` samples are shown, drawn at random in proportion to the sizes of the datasets, and at most
as many samples that training would leave out. Lengths are exact and cover all rows; they are cached, so that a later
call measures new rows only.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qwenvl.cli.data_args import TRAINING_ALONE, ToolArguments, chosen_datasets, open_encoder
from qwenvl.cli.view_data import datasets
from qwenvl.cli.view_data.rows import MediaStatistics, choose
from qwenvl.cli.view_data.samples import UNLIMITED
from qwenvl.cli.view_data.site import SampleFiles, clear, write_pages
from qwenvl.cli.view_data.writing import write_rows
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.dataset import ConversationDataset, open_tables, split_tables
from qwenvl.data.media.video.decode import prepare_backend
from qwenvl.data.packing.lengths import RowLengths, measure_lengths
from qwenvl.data.packing.plan import make_plan, read_plan
from qwenvl.utils.cache import cache_folder
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.view_data")

COUNTED = 5000
"""Rows whose media headers are read for the statistics."""

PAGE = HelpPage(
    "view_data.py --model_name_or_path MODEL --dataset_use NAMES --output DIR [--flag VALUE ...]",
    "Write a site (DIR/index.html) of samples as the model gets them: resized images, sampled frames, "
    "trained tokens, boxes, problems; and statistics of the datasets. Give the data flags of training.",
    TRAINING_ALONE - {"eval_ratio", "data_packing", "packing_plan"},
)


@dataclass
class ViewArguments(ToolArguments):
    """Flags of this tool, besides those of all tools."""

    output: str = field(default="", metadata={"help": "Folder of the site. Required."})
    limit: int = field(default=200, metadata={"help": "Most samples to show."})
    model_max_length: int = field(default=0, metadata={"help": "Most tokens of a sample. Default: no limit."})
    data_seed: int | None = field(default=None, metadata={"help": "As in training; also draws the samples to show."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Processes that measure and write. Default: one per core."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_name_or_path", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing. --help lists all flags.")
        if self.limit < 1 or self.model_max_length < 0:
            raise UserError("--limit must be 1 or more, and --model_max_length 0 (no limit) or more.")
        if self.data_packing and not self.model_max_length:
            raise UserError("--data_packing needs --model_max_length N: the most tokens of a pack, as in training.")


def main(argv: list[str] | None = None) -> int:
    """Write the site; return the exit code."""
    setup_logging("info")
    try:
        view_data(parse_class(ViewArguments, sys.argv[1:] if argv is None else argv, PAGE))
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def view_data(arguments: ViewArguments) -> None:
    """Write the site.

    Raises:
        UserError: Data or checkpoint cannot be used, or the folder cannot be written.
    """
    rows, tokenizer = open_rows(arguments)
    folder = Path(arguments.output)
    lengths = measure_lengths(rows, cache_folder(arguments.data_cache_dir), arguments.num_workers)
    try:
        clear(folder)
        media, samples, entries = write_samples(rows, lengths, tokenizer, arguments)
        split = f" ({entries:,} training rows)" if entries > samples else ""
        lead = (
            f"{_count(samples, 'sample')}{split} from {_count(len(rows), 'dataset row')}, as "
            f"{arguments.model_name_or_path} gets them. Drawn at random; samples that training leaves out are added."
        )
        write_pages(folder, title_of(rows), lead, sections(rows, lengths, media, arguments))
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error}. Choose another folder.") from error
    logger.info("%s. Open %s in a browser.", _count(samples, "sample"), (folder / "index.html").resolve())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def open_rows(arguments: ViewArguments) -> tuple[ConversationDataset, Any]:
    """Open the rows that training would use; return them and the tokenizer. Bad samples are skipped, not raised.

    Raises:
        UserError: Checkpoint, registry or annotations cannot be used.
    """
    encoder, processor = open_encoder(arguments, arguments.model_max_length or UNLIMITED)
    if encoder.overlength == "error":
        encoder = replace(encoder, overlength="drop")  # shown with its reason
    prepare_backend()
    seed = arguments.data_seed or 0
    tables = open_tables(chosen_datasets(arguments), seed, arguments.data_cache_dir)
    if arguments.eval_ratio:
        tables, _ = split_tables(tables, arguments.eval_ratio, seed)
    return ConversationDataset(tables, encoder, skip_bad_samples=True), processor.tokenizer


def title_of(rows: ConversationDataset) -> str:
    """Return the title of the pages."""
    return ", ".join(datasets.names_of(rows))


def write_samples(
    rows: ConversationDataset, lengths: RowLengths, tokenizer: Any, arguments: ViewArguments
) -> tuple[dict[str, MediaStatistics], int, int]:
    """Write the shown samples; return the media statistics by dataset, and the numbers of samples and training rows."""
    seed = arguments.data_seed or 0
    choice = choose(rows, lengths.measures["samples"] == 0, arguments.limit, COUNTED, seed)
    media: dict[str, MediaStatistics] = defaultdict(MediaStatistics)
    site = Path(arguments.output)
    files = SampleFiles(site)
    with tqdm(total=len(choice.counted), desc="Reading samples", unit=" rows", disable=None, leave=False) as progress:
        for written in write_rows(rows, tokenizer, choice, site, arguments.num_workers):
            for name, statistics in written.media.items():
                media[name].join(statistics)
            for record in written.records:
                files.add(record)
            progress.update(written.rows)
    return media, files.samples, files.close(title_of(rows))


def sections(
    rows: ConversationDataset, lengths: RowLengths, media: dict[str, MediaStatistics], arguments: ViewArguments
) -> Iterator[str]:
    """Yield the sections of the page of datasets."""
    yield from datasets.usage(rows, lengths.measures)
    yield from datasets.left_out(lengths)
    if arguments.data_packing:
        if arguments.packing_plan is not None:
            plan = read_plan(Path(arguments.packing_plan), rows, "tools/pack_data.py with the flags of this call")
        else:
            plan = make_plan(rows, lengths, arguments.data_seed or 0)
        yield from datasets.packs(rows, plan)
    yield from datasets.distributions(rows, lengths.measures, media)
