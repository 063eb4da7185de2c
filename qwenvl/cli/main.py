"""The command ``qwenvl``, with training and every tool as subcommands. ``python tools/X.py`` runs the same code.

qwenvl --help
qwenvl train configs/sft_qwen3vl_4b.yaml --dataset_use my_dataset
qwenvl launch --nproc_per_node 8 -m qwenvl.cli.main train configs/sft_qwen3vl_4b.yaml
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from qwenvl import __version__
from qwenvl.utils.errors import nearest


class Command(NamedTuple):
    """A subcommand.

    Args:
        module: Module with ``main(argv) -> int``; imported when the subcommand runs.
        summary: Line on the help page.
    """

    module: str
    summary: str


COMMANDS = {
    "train": Command(
        "qwenvl.train.train_qwen", "train a model with a recipe, flags, or both; with --dry_run, check a run"
    ),
    "launch": Command("qwenvl.train.launch", "start a command on several devices; takes the arguments of torchrun"),
    "check": Command("qwenvl.cli.check_image.command", "find every problem of every sample before training"),
    "show": Command("qwenvl.cli.show_sample", "print samples as the model sees them, trained tokens in colour"),
    "view": Command("qwenvl.cli.view_data.command", "write a site that shows samples and statistics of their datasets"),
    "rank": Command("qwenvl.cli.rank_samples.command", "list training samples, the most suspect first"),
    "advise": Command("qwenvl.cli.advise.command", "say which settings train a model on given GPUs, and how long"),
    "pack": Command("qwenvl.cli.pack_data", "plan which samples share a row, before training"),
    "predict": Command("qwenvl.cli.predict.command", "ask a model: the samples of datasets, one question, or a chat"),
    "evaluate": Command("qwenvl.cli.evaluate.command", "score answers by dataset; find out whether the images matter"),
    "evaluate-masks": Command("qwenvl.cli.evaluate_masks", "score the masks of a model trained by --task grounding"),
    "compare": Command("qwenvl.cli.compare_runs.command", "put training runs side by side: settings, scores, curves"),
    "attention": Command("qwenvl.cli.show_attention.command", "draw the attention of an answer's words over the image"),
    "merge": Command("qwenvl.cli.merge_lora", "merge adapters into their checkpoint, and check the result"),
    "serve-check": Command("qwenvl.cli.check_serving", "check that serving feeds the model as training did"),
    "export": Command("qwenvl.cli.export.command", "write a quantized copy of a model, checked against it"),
    "serve": Command("qwenvl.cli.serve_command", "serve a trained folder by vLLM with the arguments that it needs"),
    "doctor": Command("qwenvl.cli.doctor.command", "find out whether this machine is ready to train"),
    "demo-data": Command("qwenvl.cli.make_demo_data.command", "make the demo's data: digits, shapes, short clips"),
    "mask-data": Command("qwenvl.cli.make_mask_data", "make drawn scenes with masks, to try --task grounding"),
    "tiny-checkpoint": Command("qwenvl.cli.make_tiny_checkpoint.command", "make a tiny checkpoint with random weights"),
    "connector-lab": Command("qwenvl.cli.connector_lab.command", "compare connectors between vision and language"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named by the first argument; return its exit code."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(help_page() + "\n")
        return 0
    if name == "--version":
        sys.stdout.write(f"qwenvl {__version__}\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"qwenvl: no command {name!r}.{nearest(name, COMMANDS)} qwenvl --help lists them.\n")
        return 2
    sys.argv[0] = f"qwenvl {name}"  # name of the program on its help page
    command: Callable[[Sequence[str]], int] = importlib.import_module(COMMANDS[name].module).main
    return command(rest)


def help_page() -> str:
    """Return the list of all subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: qwenvl COMMAND [--flag VALUE ...]",
            "\nSupervised fine-tuning of the Qwen vision-language models.",
            "\ncommands:",
            *lines,
            "\nqwenvl COMMAND --help lists the flags of a command; qwenvl --version prints the version.",
        )
    )


def run() -> NoReturn:
    """End the process with the exit code of the subcommand."""
    if "RANK" not in os.environ:
        sys.exit(main())
    from qwenvl.utils.distributed import run_program  # imports torch, which would delay --help

    run_program(main)


if __name__ == "__main__":
    run()
