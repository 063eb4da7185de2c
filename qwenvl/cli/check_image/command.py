r"""Find every problem of every sample before training: files, texts, tags, boxes, lengths, duplicates.

    python tools/check_image.py --dataset_use "a,b" [--decode] [--model_name_or_path MODEL] [--write_clean]
    python tools/check_image.py --annotation_path FILE --data_path DIR
    python tools/check_image.py --dataset_use "a,b" --duplicates [--eval_dataset_use c]

Without ``--decode`` only the headers of media are read; with it they are decoded as in training. With a model, samples
are also rendered and their tokens counted, under the data flags of training (``--max_pixels``,
``--model_max_length``, ...). All rows are checked, whatever percentage of them ``--dataset_use`` takes.

For each dataset, ``NAME_problems.jsonl`` has one line per problem: dataset, file, line, member, id, category, reason.
With ``--write_clean``, ``NAME_valid.jsonl`` has the other samples, to replace the old files in the registry entry.
Duplicates and media tags in answers count as problems here, although training accepts both.

Exit code: 0 without a problem, 1 with problems, 2 if nothing could be checked.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from qwenvl.cli.check_image.near_duplicates import find_near_duplicates
from qwenvl.cli.check_image.report import Summary, show, write_clean, write_problem
from qwenvl.cli.check_image.samples import RESERVED_TOKENS, SampleChecker, default_settings
from qwenvl.cli.check_image.tables import Problem, check_table, find_duplicates
from qwenvl.cli.data_args import TRAINING_ALONE, ToolArguments, chosen_datasets, open_encoder
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.config.tasks import Pooling, TaskArguments, TaskName
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.targets import TargetReader
from qwenvl.data.media.video.decode import prepare_backend
from qwenvl.data.sample_stats import describe_remark
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.data.sources.table import AnnotationTable, open_annotations
from qwenvl.tasks.registry import TASKS
from qwenvl.utils.cache import cache_folder, replacing
from qwenvl.utils.cores import available_cores
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.check_image")

PAGE = HelpPage(
    "check_image.py --dataset_use NAMES [--decode] [--write_clean] [--flag VALUE ...]",
    "Find every problem of every sample: missing and damaged files, tags, roles, boxes, lengths, duplicates. Writes "
    "NAME_problems.jsonl for each dataset. --duplicates finds near duplicates and leaks of evaluation data too. Exit "
    "code 1 if there are problems, 2 if nothing could be checked.",
    TRAINING_ALONE - {"eval_dataset_use"},
)


@dataclass
class CheckArguments(ToolArguments):
    """Flags of this tool, besides those of all tools; those of tasks are training's own."""

    decode: bool = field(default=False, metadata={"help": "Decode media, instead of reading only their headers."})
    write_clean: bool = field(
        default=False,
        metadata={"help": "Write NAME_valid.jsonl: the samples without a problem, with all their fields."},
    )
    duplicates: bool = field(
        default=False,
        metadata={
            "help": "Find near duplicates too, within and across the datasets, by perceptual hashes of images (as they "
            "are, mirrored, or turned by 90, 180 or 270 degrees) and MinHash of texts; and, with --eval_dataset_use, "
            "training samples whose images evaluation shows. Images are decoded once; their hashes are cached."
        },
    )
    output: str = field(default=".", metadata={"help": "Folder for the output files."})
    model_max_length: int = field(default=8192, metadata={"help": "Most tokens of a sample; needs a model."})
    workers: int | None = field(default=None, metadata={"help": "Processes. Default: one per core."})
    task: TaskName | None = field(
        default=None, metadata={"help": "Check the field 'label' (or 'masks') for this task."}
    )
    pooling: Pooling | None = field(default=None, metadata={"help": "Pooling of the task; vision_mean needs images."})
    class_names: str | None = field(default=None, metadata={"help": "File with the classes. Default: any name."})
    keep_answer: bool = field(default=False, metadata={"help": "Setting of the task: a sample needs its answer."})

    def targets(self, encoder: SampleEncoder | None) -> TargetReader | None:
        """Return the reader of the task's targets, or None without a task.

        Raises:
            UserError: The file of class names cannot be used, or the task needs a model.
        """
        chosen = TaskArguments(
            task=self.task, pooling=self.pooling, class_names=self.class_names, keep_answer=self.keep_answer
        )
        return None if self.task is None else TASKS[self.task].reader(chosen, encoder)


def main(argv: list[str] | None = None) -> int:
    """Check the datasets; return the exit code."""
    setup_logging("warning")
    try:
        arguments = parse_class(CheckArguments, sys.argv[1:] if argv is None else argv, PAGE)
        return check(arguments)
    except UserError as error:
        logger.error("%s", error)
        return 2


def check(arguments: CheckArguments) -> int:
    """Check the datasets, write the files and print the table; return 1 if there are problems.

    Raises:
        UserError: A flag is wrong, or a dataset cannot be opened.
    """
    if arguments.eval_dataset_use and not arguments.duplicates:
        raise UserError("--eval_dataset_use is compared with the training data: add --duplicates True.")
    specs = chosen_datasets(arguments)
    checker = _checker(arguments)
    tables = [open_annotations(spec, arguments.data_cache_dir, check_ends=False) for spec in specs]
    for table, what in itertools.product(tables, ("problems", "valid")):
        _path(table, arguments, what)
    prepare_backend()
    started = time.monotonic()
    near = _near_duplicates(tables, checker, arguments) if arguments.duplicates else {}
    try:
        summaries = [
            _check_dataset(table, checker, arguments, near.get(number, ())) for number, table in enumerate(tables)
        ]
        seconds = time.monotonic() - started
        written = [_write_clean(summary, arguments) for summary in summaries if arguments.write_clean]
    except OSError as error:
        raise UserError(f"--output {arguments.output}: {error}. Choose a folder that can be written.") from error
    show(summaries, [*_notes(arguments, summaries, seconds), *written])
    return int(any(summary.bad for summary in summaries))


def _checker(arguments: CheckArguments) -> SampleChecker:
    if not arguments.model_name_or_path:
        targets = arguments.targets(None)
        settings = default_settings(arguments)
        reserved, remote = RESERVED_TOKENS, arguments.allow_remote_media
        return SampleChecker(settings, reserved, remote, arguments.decode, labels=targets)
    encoder, _ = open_encoder(arguments, arguments.model_max_length)
    targets = arguments.targets(encoder)
    encoder = replace(encoder, targets=targets)
    return SampleChecker(
        *(encoder.settings, encoder.reserved_tokens, encoder.allow_remote, arguments.decode, encoder),
        labels=targets,
    )


def _near_duplicates(
    tables: list[AnnotationTable], checker: SampleChecker, arguments: CheckArguments
) -> dict[int, list[Problem]]:
    """Return the near duplicates and leaks of each table, by its number."""
    names = arguments.eval_dataset_use
    specs = parse_dataset_use(names, load_registry(arguments.dataset_registry)) if names else []
    evaluation = [open_annotations(spec, arguments.data_cache_dir, check_ends=False) for spec in specs]
    return find_near_duplicates(
        *(tables, evaluation, tuple(checker.reserved_tokens), checker.allow_remote),
        cache=cache_folder(arguments.data_cache_dir),
        workers=_workers(arguments),
    )


def _workers(arguments: CheckArguments) -> int:
    return available_cores() if arguments.workers is None else arguments.workers


def _check_dataset(
    table: AnnotationTable, checker: SampleChecker, arguments: CheckArguments, near: Sequence[Problem]
) -> Summary:
    """Check a dataset and write its problems; near duplicates and leaks come last."""
    workers = _workers(arguments)
    summary = Summary(table)
    with (
        replacing(_path(table, arguments, "problems")) as path,
        path.open("w", encoding="utf-8") as file,
        tqdm(total=len(table), desc=f"Checking {table.spec.name}", unit=" rows", disable=None, leave=False) as progress,
    ):
        for checked in check_table(table, checker, workers):
            summary.add(checked)
            for problem in checked.problems:
                summary.note(problem)
                write_problem(file, problem)
            progress.update(len(checked.samples))
        exact = list(find_duplicates(table, np.concatenate(summary.samples), b"".join(summary.digests)))
        named = {problem[:2] for problem in exact}
        others = [one for one in near if one.category != "near_duplicate" or one[:2] not in named]
        for problem in (*exact, *others):
            summary.note(problem)
            write_problem(file, problem)
    return summary


def _write_clean(summary: Summary, arguments: CheckArguments) -> str:
    path = _path(summary.table, arguments, "valid")
    with replacing(path) as temporary:
        rows = write_clean(summary, temporary)
    return f"{path}: {rows:,} rows without a problem."


def _path(table: AnnotationTable, arguments: CheckArguments, what: str) -> Path:
    """Return the path of an output file, which is never an input file.

    Raises:
        UserError: It is an annotation file of the dataset.
    """
    path = Path(arguments.output) / f"{table.spec.name.replace(os.sep, '_')}_{what}.jsonl"
    if path.exists() and any(os.path.exists(rows.path) and path.samefile(rows.path) for rows in table.files):
        raise UserError(f"{path} is an annotation file of dataset {table.spec.name!r}. Choose another --output folder.")
    return path


def _notes(arguments: CheckArguments, summaries: list[Summary], seconds: float) -> list[str]:
    """Return the notes below the table."""
    media = sum(summary.media for summary in summaries)
    how = "decoded" if arguments.decode else "checked by their headers"
    rate = f" ({media / seconds:,.0f} per second)" if seconds > 1 else ""
    notes = [f"{media:,} images and videos {how} in {seconds:.1f} s{rate}."]
    if not arguments.decode:
        notes.append("Not checked: pixels, for instance of files cut behind their header. --decode reads them.")
    if not arguments.model_name_or_path:
        notes.append("Not checked: lengths and chat template. --model_name_or_path MODEL checks them.")
    if any(summary.table.spec.sampling_percent != 100 for summary in summaries):
        notes.append("All rows were checked, whatever percentage of them is used.")
    for summary in summaries:
        keys = ", ".join(sorted(summary.unread_keys))
        notes += [f"Dataset {summary.table.spec.name!r}: nothing reads {keys}."] if keys else []
        notes += [describe_remark(summary.table.spec.name, kind, summary.remarks[kind]) for kind in summary.remarks]
    return notes + [
        f"{_path(summary.table, arguments, 'problems')}: every problem of every sample." for summary in summaries
    ]
