r"""Ask a trained folder the demo's held-out questions; print a table and write a page with its answers.

    python examples/demo/report.py --model DIR --data DIR --output report.html [--limit N]

The model is opened with the stock classes of transformers. Beside the page, ``report.jsonl`` holds every answer.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

if __package__ in (None, ""):  # run as a script: make the repository's packages importable from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.demo.losses import read_losses
from examples.demo.page import build_demo_page
from examples.demo.results import Result, TaskScore, answer_heldout, score, write_results
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.demo_report")

PRINTED = 3
"""Samples of every task in the printed table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, print and write; return the exit code."""
    arguments = read_arguments(argv)
    setup_logging("info")
    try:
        report(arguments.model, arguments.data, arguments.output, arguments.limit)
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ask a trained folder the demo's held-out questions.")
    parser.add_argument("--model", required=True, type=Path, help="trained folder")
    parser.add_argument("--data", required=True, type=Path, help="folder that tools/make_demo_data.py wrote")
    parser.add_argument("--output", required=True, type=Path, help="page to write, such as report.html")
    parser.add_argument("--limit", type=int, help="most samples of a task; default: all")
    return parser.parse_args(argv)


def report(model: Path, data: Path, output: Path, limit: int | None = None) -> list[TaskScore]:
    """Answer the held-out samples, print the tables and write the page.

    Returns:
        The score of every task.

    Raises:
        UserError: The model or the data cannot be used.
    """
    results = answer_heldout(str(model), data.resolve(), limit=limit)
    scores = score(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_results(output.with_suffix(".jsonl"), results)
    output.write_text(build_demo_page(results, scores, read_losses(model)), encoding="utf-8")
    console = Console()
    console.print(answer_table(results, data.resolve()))
    console.print(score_table(scores))
    console.print(f"Page with all answers: {output.resolve()}", highlight=False, soft_wrap=True)
    return scores


def answer_table(results: Sequence[Result], data: Path) -> Table:
    """Return a table of the first samples of every task."""
    table = Table(title="Held-out samples", show_lines=False)
    for name in ("image", "question", "answer", "prediction", ""):
        table.add_column(name, overflow="fold")
    printed: dict[str, int] = {}
    for result in results:
        printed[result.task] = printed.get(result.task, 0) + 1
        if printed[result.task] > PRINTED:
            continue
        media = "\n".join(str(Path(path).relative_to(data)).removeprefix("media/") for path in result.media)
        verdict = Text("right", "green") if result.right else Text("wrong", "bold red")
        cells = [Text(text) for text in (media, result.question.strip(), result.expected, result.answer.strip())]
        table.add_row(*cells, verdict, end_section=printed[result.task] == PRINTED)
    return table


def score_table(scores: Sequence[TaskScore]) -> Table:
    """Return a table of accuracy and chance level, one row per task."""
    table = Table(title="Right answers")
    table.add_column("task")
    for name in ("right", "accuracy", "chance"):
        table.add_column(name, justify="right")
    for one in scores:
        table.add_row(one.task, f"{one.right} of {one.total}", f"{one.accuracy:.1%}", f"{one.chance:.0%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
