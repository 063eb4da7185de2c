r"""Rank training samples, the most suspect first: wrong labels, samples never learned, images that do not matter.

    python tools/rank_samples.py --sample_losses output/sample_losses.parquet --output ranking
    torchrun --nproc_per_node=8 tools/rank_samples.py --model_name_or_path MODEL --dataset_use a,b --output ranking
    python tools/rank_samples.py --sample_losses FILE --decisions decisions.jsonl --output ranking

The first command ranks by the losses that training with ``--log_sample_losses True`` kept; several files are losses of
several runs. The second computes the losses of all samples with a model, also with blank images and with those of other
samples; it can be stopped and resumed. Both together use all evidence. The folder then has ``ranking.jsonl``, a line a
sample; ``ranking.json``, the counts; ``NAME_kept.jsonl`` of each dataset, its rows without the suspects, copied byte
for byte; and ``page/index.html``, which shows the first ones. Its buttons keep or drop samples, and save
``decisions.jsonl``, which the third command applies.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwenvl.cli.inference_args import NOT_ASKED
from qwenvl.cli.rank_samples.arguments import RankArguments
from qwenvl.cli.rank_samples.evidence import read_evidence
from qwenvl.cli.rank_samples.lists import Lists, apply_decisions, open_lists, read_decisions
from qwenvl.cli.rank_samples.page import write_page
from qwenvl.cli.rank_samples.scoring import score_views
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.evaluate.ranking import REASONS, Key, Ranked, count_reasons, rank_samples
from qwenvl.utils.cache import replacing
from qwenvl.utils.distributed import is_first_to_say, is_main_process, run_program, shut_down, start_group
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.rank_samples")

PAGE = HelpPage(
    "rank_samples.py [--sample_losses FILE ...] [--model_name_or_path MODEL --dataset_use NAMES] --output DIR",
    "Rank training samples by how suspect they are, from their losses in training, from a model's losses with and "
    "without their images, or both. Writes ranking.jsonl, lists to train on, and a page.",
    NOT_ASKED,
)


def main(argv: list[str] | None = None) -> int:
    """Rank; return the exit code."""
    setup_logging("info")
    try:
        run(parse_class(RankArguments, sys.argv[1:] if argv is None else argv, PAGE))
    except UserError as error:
        if is_first_to_say("error"):
            logger.error("%s", error)
        return 1
    shut_down()
    return 0


def run(arguments: RankArguments) -> None:
    """Score if a model is given, rank, print and write; every process has to call it.

    Raises:
        UserError: Losses, model, data or output cannot be used.
    """
    start_group()
    folder = Path(arguments.output)
    views = score_views(arguments, folder) if arguments.model_name_or_path else None
    if not is_main_process():
        return
    ranked = rank_samples(read_evidence([Path(one) for one in arguments.sample_losses or ()], views))
    drop = {one.key for one in ranked if arguments.dropped_reasons.intersection(one.reasons)}
    if arguments.decisions is not None:
        drop = apply_decisions(drop, read_decisions(Path(arguments.decisions)))
    lists = open_lists(arguments, ranked)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = write(folder, ranked, drop, lists)
        shown = ranked[: arguments.limit]
        page = write_page(arguments, shown, drop, lists, folder / "page") if shown else None
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error}. Choose another folder.") from error
    show(ranked, kept)
    logger.info("%s: all %s samples.", (folder / "ranking.jsonl").resolve(), f"{len(ranked):,}")
    if page is not None:
        logger.info("Open %s in a browser.", page.resolve())


def write(folder: Path, ranked: Sequence[Ranked], drop: set[Key], lists: Lists) -> Mapping[str, tuple[int, int]]:
    """Write the list, the counts and the rows to train on; return (rows kept, samples dropped) of each dataset."""
    with replacing(folder / "ranking.jsonl") as path:
        lines = (json.dumps(one.as_dict(), ensure_ascii=True) + "\n" for one in ranked)
        path.write_text("".join(lines), encoding="utf-8")
    kept = lists.write(folder, drop)
    samples, counts = Counter(one.key[0] for one in ranked), count_reasons(ranked)
    record = {
        name: {
            "samples": samples[name],
            "reasons": {reason: counts.get((name, reason), 0) for reason in REASONS},
            "rows_kept": rows,
            "samples_dropped": dropped,
        }
        for name, (rows, dropped) in kept.items()
    }
    with replacing(folder / "ranking.json") as path:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return kept


def show(ranked: Sequence[Ranked], kept: Mapping[str, tuple[int, int]]) -> None:
    """Print a table of the reasons by dataset."""
    table = Table(title="Suspect samples")
    for name in ("dataset", "samples", *REASONS, "dropped", "rows kept"):
        table.add_column(name.replace("_", " "), justify="left" if name == "dataset" else "right")
    counts = count_reasons(ranked)
    for dataset, samples in Counter(one.key[0] for one in ranked).items():
        rows, dropped = kept[dataset]
        numbers = (samples, *(counts.get((dataset, name), 0) for name in REASONS), dropped, rows)
        table.add_row(dataset, *(f"{one:,}" for one in numbers))
    console = Console(highlight=False, soft_wrap=True)
    (console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=160)).print(table)


if __name__ == "__main__":
    run_program(main)
