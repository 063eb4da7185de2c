r"""Run the experiments of a recipe and compare how well connectors pass the image to the language model.

    python tools/connector_lab.py configs/lab/connectors.yaml --output lab
    python tools/connector_lab.py configs/lab/stages.yaml --output lab-stages [--only NAME ...]

Each run combines a vision encoder, a connector and a language model, trains the parts that it names in one or more
stages, and asks about held-out samples: with their images, with blank ones and with those of other samples. Finished
runs are skipped when the command is repeated. Writes ``results.json`` and ``connector_lab.html``; each run's folder
holds its models and its ``evaluation/evaluation.html``.

Exit code: 0; 1 if the generations of a shown run collapse; 2 if something could not be done.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwenvl.cli.connector_lab.format import COLUMNS, cells, verdict
from qwenvl.cli.connector_lab.page import build_lab_page
from qwenvl.cli.connector_lab.recipe import read_experiments
from qwenvl.cli.connector_lab.runner import Lab, Result, collapse_of, run_experiment
from qwenvl.utils.cache import replacing
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.connector_lab")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments; return the exit code."""
    arguments = read_arguments(argv)
    setup_logging("info")
    try:
        return run(arguments.recipe, arguments.output, arguments.only)
    except UserError as error:
        logger.error("%s", error)
        return 2


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run the experiments of a recipe and compare them.")
    parser.add_argument("recipe", help="YAML file, such as configs/lab/connectors.yaml")
    parser.add_argument("--output", required=True, type=Path, help="folder for all output")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs to execute, with the runs they start from")
    return parser.parse_args(argv)


def run(path: str, output: Path, only: Sequence[str] | None = None) -> int:
    """Run the unfinished experiments, write the results and print them; return the exit code.

    Raises:
        UserError: Recipe, parts or data cannot be used.
    """
    recipe = read_experiments(path)
    wanted = set(only or [one.name for one in recipe.runs])
    if unknown := sorted(wanted - {one.name for one in recipe.runs}):
        raise UserError(f"--only {unknown[0]}: the recipe's runs are {', '.join(one.name for one in recipe.runs)}.")
    for one in reversed(recipe.runs):
        if one.name in wanted and one.start is not None:
            wanted.add(one.start)
    output.mkdir(parents=True, exist_ok=True)
    lab = Lab(recipe, output)
    lab.prepare()
    results: list[Result] = []
    for one in recipe.runs:
        if one.name in wanted:
            logger.info("Run %s: %s.", one.name, one.about)
            result, new = run_experiment(lab, one)
            logger.info("Run %s: %s.", one.name, "finished" if new else "skipped, as it is finished already")
            results += [result] * one.shown
            save(output, results)
    show(output, results)
    return int(any(collapse_of(result["answers"]) for result in results))


def save(output: Path, results: Sequence[Result]) -> None:
    """Write results.json and the page of the finished runs."""
    with replacing(output / "results.json") as path:
        path.write_text(json.dumps(list(results), indent=2) + "\n", encoding="utf-8")
    with replacing(output / "connector_lab.html") as path:
        path.write_text(build_lab_page(results), encoding="utf-8")


def show(output: Path, results: Sequence[Result]) -> None:
    """Print the tables and the verdicts."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=180)
    for group in dict.fromkeys(result["group"] for result in results):
        table = Table(title=group)
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("run", "looks") else "right")
        for result in results:
            if result["group"] == group:
                table.add_row(*cells(result))
        console.print(table)
    for result in results:
        style = "bold red" if collapse_of(result["answers"]) else None
        console.print(f"{result['name']}: {verdict(result)}", style=style, markup=False)
    console.print(f"Page: {(output / 'connector_lab.html').resolve()}", markup=False)
