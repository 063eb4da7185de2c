r"""Put training runs side by side: what differs in settings, data and versions; scores with intervals; curves.

    python tools/compare_runs.py OUTPUT_DIR OUTPUT_DIR [OUTPUT_DIR ...] [--output comparison.html]
    python tools/compare_runs.py output/qwenvl-array-4711/run-*

Reads the records of finished and unfinished runs (``training_args.yaml``, ``data.json``, ``versions.json``,
``trainer_state.json``, ``eval_answers.jsonl``, and the ``evaluation.json`` of tools/evaluate.py in the folder or one
level below). Prints two tables, and writes them with the curves over one another as a page.

Exit code: 0, or 2 if a folder is not a run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from qwenvl.cli.compare_runs.records import read_runs
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.report.compare_page import RunRecord, build_compare_page, differences, results
from qwenvl.utils.cache import replacing
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging
from qwenvl.utils.tables import as_text, table

logger = logging.getLogger("qwenvl.compare")

PAGE = HelpPage(
    "compare_runs.py OUTPUT_DIR OUTPUT_DIR [OUTPUT_DIR ...] [--output FILE]",
    "Put training runs side by side: differences of settings, data and versions, scores with intervals, and curves. "
    "Prints tables and writes a page.",
)


@dataclass
class CompareArguments:
    """Flags of this tool."""

    output: str = field(default="comparison.html", metadata={"help": "Page to write."})


def main(argv: list[str] | None = None) -> int:
    """Compare the runs; return the exit code."""
    setup_logging("warning")
    words = sys.argv[1:] if argv is None else list(argv)
    split = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    try:
        arguments = parse_class(CompareArguments, words[split:], PAGE)
        runs = read_runs(words[:split])
        path = Path(arguments.output)
        try:
            with replacing(path) as temporary:
                temporary.write_text(build_compare_page(runs), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {path}: {error}. Choose a file that can be written.") from error
    except UserError as error:
        logger.error("%s", error)
        return 2
    show(runs, path)
    return 0


def show(runs: Sequence[RunRecord], path: Path) -> None:
    """Print the tables."""
    names = [run.name for run in runs]
    different = differences(runs)
    texts = range(len(names) + 2)
    parts: list[Table | str] = [table("Results", ("", *names), results(runs), words=texts)]
    if different:
        parts.append(table("What differs", ("", "", *names), different, words=texts))
    else:
        parts.append("Nothing differs in settings, data and versions.")
    parts.append(f"Page with the curves: {path.resolve()}")
    sys.stdout.write(as_text(*parts, stream=sys.stdout) + "\n")


if __name__ == "__main__":
    sys.exit(main())
