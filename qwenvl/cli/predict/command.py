r"""Ask a model: the samples of datasets, one question, or a chat.

    python tools/predict.py --model_name_or_path MODEL --dataset_use "a%10,b" --output answers.jsonl
    torchrun --nproc_per_node=8 tools/predict.py --model_name_or_path MODEL --annotation_path FILE --data_path DIR \
        --output answers.jsonl
    python tools/predict.py --model_name_or_path MODEL --server http://localhost:8000 --dataset_use a --output FILE
    python tools/predict.py --model_name_or_path MODEL --image a.jpg --prompt "What is this?"
    python tools/predict.py --model_name_or_path MODEL

MODEL is a folder of a whole model or of adapters. The first three commands write one JSON line per sample, in the order
of the data: dataset, file, line, id, question, expected, prediction, finish_reason (``length`` if ``--max_new_tokens``
cut the answer, else ``stop``); or error, for a sample that cannot be asked. When they are stopped and started again,
with any number of processes, they answer the missing samples. With ``--server``, a running server answers, which
scripts/serve.sh starts with the arguments that MODEL needs. ``--image`` and ``--video`` take several files. With only
a model, the command starts a chat.

For a model with the head of a task (``--task`` in training), ``prediction`` is the label, and ``scores`` are the
probabilities of the classes or the scores of the images; samples need no label, and metrics are printed if they have
one.

Exit code: 0; 1 if samples could not be asked (the output has the reasons); 2 if nothing could be done.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from qwenvl.cli.inference_args import (
    NOT_ASKED,
    AnswerArguments,
    answer_all,
    open_asking_encoder,
    open_job,
    open_model,
    open_predictor,
)
from qwenvl.cli.predict.chat import Chat, answer_aloud
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.conversation.media_items import image_item, video_item
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.types import Message, TextPart
from qwenvl.inference.prompts import open_prompt
from qwenvl.metrics.predictions import Prediction
from qwenvl.tasks.heads.labelling import label_metrics
from qwenvl.utils.distributed import (
    is_first_to_say,
    is_main_process,
    run_program,
    shut_down,
    start_group,
    world_size,
)
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.predict")

PAGE = HelpPage(
    "predict.py --model_name_or_path MODEL [--dataset_use NAMES --output FILE | --prompt TEXT] [--flag VALUE ...]",
    "Ask a model: the samples of datasets (several processes by torchrun, resumable), one question about images and "
    "videos, or, if only a model is given, in a chat.",
    NOT_ASKED,
)


@dataclass
class PredictArguments(AnswerArguments):
    """Flags of this tool, besides those of the tools that ask a model."""

    output: str | None = field(default=None, metadata={"help": "JSON lines file for the answers to datasets."})
    prompt: str | None = field(default=None, metadata={"help": "One question, answered in the terminal."})
    image: list[str] = field(default_factory=list, metadata={"help": "Images to ask about, one or more."})
    video: list[str] = field(default_factory=list, metadata={"help": "Videos to ask about, one or more."})

    def __post_init__(self) -> None:
        super().__post_init__()
        data = bool(self.dataset_use or self.annotation_path)
        if data and (self.prompt is not None or self.image or self.video):
            raise UserError("Give data (--dataset_use, --annotation_path) or one question (--prompt), not both.")
        if data and self.output is None:
            raise UserError("--output is missing: the JSON lines file of the answers.")
        if self.output is not None and not data:
            raise UserError("--output is for answers to datasets: name them by --dataset_use or --annotation_path.")
        if (self.image or self.video) and self.prompt is None:
            raise UserError('--prompt is missing: the question about the media, such as --prompt "What is this?".')
        if not data and self.server is not None:
            raise UserError("--server answers datasets: name them by --dataset_use or --annotation_path.")
        if not data and world_size() > 1:
            raise UserError("One question or a chat is for one process: start it without torchrun.")


def main(argv: list[str] | None = None) -> int:
    """Ask; return the exit code."""
    setup_logging("warning")
    try:
        code = run(parse_class(PredictArguments, sys.argv[1:] if argv is None else argv, PAGE))
    except UserError as error:
        if is_first_to_say("error"):
            logger.error("%s", error)
        return 2
    shut_down()
    return code


def run(arguments: PredictArguments) -> int:
    """Answer datasets or a question, or start a chat; return the exit code.

    Raises:
        UserError: Model, data or output cannot be used.
    """
    if arguments.output is not None:
        start_group()
        job = open_job(arguments)
        lines = answer_all(arguments, job, Path(arguments.output))
        return summarize(lines, arguments.output) if is_main_process() else 0
    encoder = open_asking_encoder(arguments)
    reader = MediaReader("", arguments.allow_remote_media, video_timeout=arguments.video_timeout)
    if arguments.prompt is None:
        if encoder.targets is not None:
            raise UserError("A model with the head of a task predicts labels and cannot chat: name data or a --prompt.")
        Chat(open_model(arguments, encoder), encoder.settings, reader, arguments.decoding).run()
        return 0
    images, videos = map(image_item, arguments.image), map(video_item, arguments.video)
    turn = Message("user", (*images, *videos, TextPart(arguments.prompt)))
    prompt = open_prompt([turn], reader, encoder.settings)  # before opening the model, which takes long
    if encoder.targets is not None:
        found = open_predictor(arguments, encoder).predict_prompts([prompt])[0]
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
        return 0
    answer_aloud(open_model(arguments, encoder), prompt, arguments.decoding)
    return 0


def summarize(lines: list[Prediction], output: str) -> int:
    """Print the numbers of answers and of samples that could not be asked; return the exit code."""
    for name, value in label_metrics(lines).items():
        sys.stdout.write(f"{name.replace('_', ' ')}: {value:.4g}\n")
    bad = [line for line in lines if line.error is not None]
    cut = sum(line.finish_reason == "length" for line in lines)
    told = f' ({cut:,} of them cut at --max_new_tokens: "finish_reason": "length")' if cut else ""
    answered = f"{len(lines) - len(bad):,} answers{told}"
    sys.stdout.write(f"{output}: {answered}, {len(bad):,} samples that could not be asked.\n")
    for reason, count in Counter((line.error or "").partition(":")[0] for line in bad).most_common():
        first = next(line for line in bad if (line.error or "").startswith(reason))
        sys.stdout.write(f"  {count:,} x {reason}, first: {first.file}:{first.line}: {first.error}\n")
    return int(bool(bad))


if __name__ == "__main__":
    run_program(main)
