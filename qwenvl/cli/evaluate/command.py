r"""Score answers by dataset, with confidence intervals, and test whether they depend on the images.

    python tools/evaluate.py --predictions answers.jsonl --output evaluation
    torchrun --nproc_per_node=8 tools/evaluate.py --model_name_or_path MODEL --dataset_use "a%10,b" --output evaluation
    python tools/evaluate.py --model_name_or_path MODEL --dataset_use a --blind --output evaluation

The first command scores the output of tools/predict.py. The second generates answers first, as predict.py does, into
``predictions.jsonl`` of the output folder, and can be stopped and resumed; with ``--server``, a running server
answers. With ``--blind`` the same questions are also asked with blank images and with those of other samples, and the
loss is computed: a model that ignores the image scores the same. The results are printed as a table, and written as
JSON and as a page of the worst samples.

The metric of a dataset is that of ``--metric``; else the field ``metric`` of a sample or of the dataset's registry
entry; else it depends on the expected answers: box_accuracy for boxes, multiple_choice for letters to questions with
options, json_equal for JSON objects, chrf for texts of a dozen words, exact_match for anything else. A sample's field
``answers`` lists further right answers.

Exit code: 0; 1 if samples could not be asked; 2 if nothing could be done.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwenvl.cli.evaluate.page import OtherAnswers, build_evaluation_page, number, percent
from qwenvl.cli.inference_args import NOT_ASKED, AnswerArguments, answer_all, open_job, open_model, progress_bar
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.evaluate.image_ablation import ImageAblation
from qwenvl.evaluate.scoring import Scores, evaluate, evaluate_views
from qwenvl.inference.answer_rows import answer_rows
from qwenvl.inference.other_images import VIEWS, View, find_partners, key_of
from qwenvl.metrics.predictions import Prediction, read_predictions
from qwenvl.metrics.registry import METRICS, find_metric
from qwenvl.tasks.heads.labelling import label_metrics
from qwenvl.utils.cache import replacing
from qwenvl.utils.distributed import is_first_to_say, is_main_process, run_program, shut_down, start_group
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.evaluate")

PAGE = HelpPage(
    "evaluate.py [--predictions FILE | --model_name_or_path MODEL --dataset_use NAMES] [--blind] [--flag VALUE ...]",
    "Score the answers of a model by dataset. Writes evaluation.json and evaluation.html, a page of the worst samples. "
    "With --blind, also find out whether the answers depend on the images.",
    NOT_ASKED,
)

Views = Mapping[View, Sequence[Prediction]]


@dataclass
class EvaluateArguments(AnswerArguments):
    """Flags of this tool, besides those of the tools that ask a model."""

    predictions: str | None = field(
        default=None, metadata={"help": "JSON lines of tools/predict.py to score, instead of asking a model."}
    )
    output: str = field(default="evaluation", metadata={"help": "Folder for the output files."})
    metric: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(METRICS)}. Default: that of the sample or dataset, else by the answers."},
    )
    worst: int = field(default=24, metadata={"help": "Samples of each dataset on the page, from the lowest score up."})
    blind: bool = field(
        default=False,
        metadata={"help": "Ask with blank images and with those of other samples too, and compare score and loss."},
    )

    def __post_init__(self) -> None:
        if self.metric is not None:
            find_metric(self.metric)
        if self.worst < 0:
            raise UserError("--worst must be 0 or more.")
        if self.server is not None and self.blind:
            raise UserError("--blind computes losses, which a --server does not. Leave one of them out.")
        if self.predictions is None:
            super().__post_init__()
        elif self.blind or self.dataset_use or self.annotation_path or self.model_name_or_path or self.server:
            raise UserError(
                "--predictions is scored without a model: leave out --blind, the model, the server and the data; or "
                "leave out --predictions to ask the model."
            )


def main(argv: list[str] | None = None) -> int:
    """Score; return the exit code."""
    setup_logging("warning")
    try:
        code = run(parse_class(EvaluateArguments, sys.argv[1:] if argv is None else argv, PAGE))
    except UserError as error:
        if is_first_to_say("error"):
            logger.error("%s", error)
        return 2
    shut_down()
    return code


def run(arguments: EvaluateArguments) -> int:
    """Ask the model unless predictions are given, score, print and write; return the exit code.

    Raises:
        UserError: Model, data, predictions or output cannot be used.
    """
    if arguments.predictions is not None:
        views: Views = {"shown": read_predictions(Path(arguments.predictions))}
    else:
        start_group()
        views = ask(arguments)
    if not is_main_process():
        return 0
    scores = evaluate(views["shown"], arguments.metric)
    ablation = evaluate_views(scores, views) if arguments.blind else []
    try:
        write(arguments, scores, ablation, views)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: {error}. Choose a folder that can be written.") from error
    show(arguments, scores, ablation)
    return int(any(one.not_asked for one in scores))


def ask(arguments: EvaluateArguments) -> Views:
    """Answer the samples in each requested view; every process has to call it.

    Raises:
        UserError: Model, data or output cannot be used.
    """
    job, folder = open_job(arguments), Path(arguments.output)
    model = functools.cache(lambda: open_model(arguments, job.encoder))
    if job.encoder.targets is not None and arguments.blind:
        raise UserError("--blind asks for answers, and this model has the head of a task. Leave it out.")
    shown = answer_all(arguments, replace(job, with_loss=arguments.blind), folder / "predictions.jsonl")
    if not arguments.blind:
        return {"shown": shown}
    views: dict[View, Sequence[Prediction]] = {"shown": shown}
    partners = find_partners(shown, arguments.seed)
    for view in VIEWS[1:]:
        viewed = replace(job, with_loss=True, view=view, partners=partners if view == "swapped" else {})
        output = folder / f"predictions_{view}.jsonl"
        views[view] = answer_rows(viewed, output, model, progress_bar(f"Answering, images {view}"))
    return views


def write(
    arguments: EvaluateArguments, scores: Sequence[Scores], ablation: Sequence[ImageAblation], views: Views
) -> None:
    """Write evaluation.json and evaluation.html."""
    folder = Path(arguments.output)
    asked = arguments.predictions or arguments.model_name_or_path
    record = {
        "model" if arguments.predictions is None else "predictions": asked,
        "datasets": [one.as_dict() for one in scores],
        **({"labels": labels} if (labels := _label_metrics(scores)) else {}),
        **({"blind": [one.as_dict() for one in ablation]} if arguments.blind else {}),
    }
    others: OtherAnswers = {
        view: {key_of(line): line for line in lines} for view, lines in views.items() if view != "shown"
    }
    page = build_evaluation_page(f"Evaluation of {asked}", scores, ablation, others, arguments.worst)
    for name, text in (("evaluation.json", json.dumps(record, indent=2) + "\n"), ("evaluation.html", page)):
        with replacing(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def _label_metrics(scores: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """Return the metrics of labels predicted by a head, by dataset."""
    found = {one.dataset: label_metrics(one.lines) for one in scores}
    return {name: metrics for name, metrics in found.items() if metrics}


def show(arguments: EvaluateArguments, scores: Sequence[Scores], ablation: Sequence[ImageAblation]) -> None:
    """Print the table and the verdicts."""
    table = Table(title="Scores")
    for name in ("dataset", "score", "95% CI", "samples", "metric", "unreadable", "cut", "not asked"):
        table.add_column(name, justify="left" if name in ("dataset", "metric") else "right")
    for one in scores:
        counts = (f"{one.unreadable:,}", number(one.cut), f"{len(one.not_asked):,}")
        table.add_row(one.dataset, *percent(one.interval()), f"{len(one.lines):,}", one.metric.title, *counts)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=160)
    console.print(table)
    if cut := sum(one.cut or 0 for one in scores):
        console.print(
            f"{cut:,} answers were cut at --max_new_tokens and are scored as they are. Raise it.", markup=False
        )
    for name, metrics in _label_metrics(scores).items():
        told = ", ".join(f"{metric.replace('_', ' ')} {value:.4g}" for metric, value in metrics.items())
        console.print(f"{name}: {told}", markup=False)
    for found in ablation:
        console.print(f"{found.name}: {found.verdict}", markup=False)
        console.print(f"  {found.count:,} samples compared, {found.left_out:,} left out.", style="dim")
    console.print(f"Page of the worst: {(Path(arguments.output) / 'evaluation.html').resolve()}", markup=False)


if __name__ == "__main__":
    run_program(main)
