r"""Draw the attention of an answer's words over the image, on one HTML page.

    python tools/show_attention.py --model_name_or_path MODEL --dataset_use NAMES --output attention.html
    python tools/show_attention.py --model_name_or_path MODEL --image a.jpg --prompt "What is here?" \
        --phrases "a red car,the tree" --output attention.html

For rows of a dataset, the phrases are those of their ``masks``, or ``--phrases``, or the whole answer. For ``--image``
the model answers, unless ``--answer`` gives the answer. A model trained by ``--task grounding`` also predicts masks,
which are drawn too. ``--layers 20,21`` and ``--heads 0,3`` select some of the maps; ``--per_token True`` shows every
token.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenvl.cli.data_args import chosen_datasets
from qwenvl.cli.inference_args import NOT_ASKED, AskArguments, open_asking_encoder
from qwenvl.cli.show_attention.page import Looked, Shown, attention_page
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoded import EncodedSample, Plan
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.media.resize import ImagePlan
from qwenvl.data.types import Sample
from qwenvl.inference.prompts import open_example
from qwenvl.tasks.grounding.masks import read_mask
from qwenvl.tasks.grounding.phrases import Place
from qwenvl.tasks.grounding.predict import Grounder, open_grounder
from qwenvl.utils.errors import Origin, SampleError, UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.show_attention")

PAGE = HelpPage(
    "show_attention.py --model_name_or_path MODEL (--dataset_use NAMES | --image FILE --prompt TEXT) --output FILE",
    "Draw the attention of an answer's words over the image, for every phrase: of all layers and heads, or of some; "
    "and the masks that a model trained by --task grounding predicts.",
    NOT_ASKED | {"batch_size", "seed"},
)
_SPEAKERS = ("user", "assistant")


@dataclass
class AttentionArguments(AskArguments):
    """Flags of this tool, besides those of the tools that ask a model."""

    output: str = field(default="attention.html", metadata={"help": "HTML file to write."})
    image: str | None = field(default=None, metadata={"help": "An image to ask about, instead of a dataset."})
    prompt: str = field(default="Describe the image.", metadata={"help": "Question about --image."})
    answer: str | None = field(default=None, metadata={"help": "The answer about --image. Default: the model's."})
    phrases: str | None = field(default=None, metadata={"help": "Words of the answers, separated by commas."})
    layers: str | None = field(default=None, metadata={"help": "Numbers of layers, from 0, with commas. Default: all."})
    heads: str | None = field(default=None, metadata={"help": "Numbers of heads, from 0, with commas. Default: all."})
    per_token: bool = field(default=False, metadata={"help": "Show every token of a phrase as well."})
    limit: int = field(default=8, metadata={"help": "Number of rows of the dataset to show, from the first."})


def main(argv: list[str] | None = None) -> int:
    """Write the page; return the exit code."""
    setup_logging("info")
    try:
        arguments = parse_class(AttentionArguments, sys.argv[1:] if argv is None else argv, PAGE)
        write_page(arguments)
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def write_page(arguments: AttentionArguments) -> None:
    """Open model and samples, and write the page.

    Raises:
        UserError: A flag, the model or a sample cannot be used, or the page cannot be written.
    """
    encoder = open_asking_encoder(arguments)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    grounder = open_grounder(arguments.model_name_or_path, base=arguments.base, device=arguments.device, dtype=dtype)
    layers, heads = chosen_maps(arguments, grounder)
    shown = [
        show(sample, arguments, encoder, grounder, (layers, heads))
        for sample in select_samples(arguments, encoder, grounder)
    ]
    numbers = [grounder.layers[place] for place in layers]
    page = attention_page(f"Attention of {Path(arguments.model_name_or_path).name}", shown, numbers)
    try:
        Path(arguments.output).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {arguments.output} cannot be written: {error.strerror}.") from error
    logger.info("%d samples. Open %s in a browser.", len(shown), Path(arguments.output).resolve())


def chosen_maps(arguments: AttentionArguments, grounder: Grounder) -> tuple[list[int], list[int]]:
    """Return the indices of the shown layers among those with maps, and the numbers of the shown heads.

    Raises:
        UserError: A layer or head does not exist.
    """
    text: Any = grounder.chat_model.model.config.get_text_config()
    layers = _numbers(arguments.layers, "layers", grounder.layers)
    return [grounder.layers.index(layer) for layer in layers], _numbers(
        arguments.heads, "heads", range(text.num_attention_heads)
    )


def _numbers(written: str | None, flag: str, known: Sequence[int]) -> list[int]:
    if written is None:
        return list(known)
    words = [word.strip() for word in written.split(",")]
    if not all(word.isdigit() and int(word) in known for word in words):
        raise UserError(f"--{flag} {written}: there are {', '.join(map(str, known))}.")
    return [int(word) for word in words]


def select_samples(arguments: AttentionArguments, encoder: SampleEncoder, grounder: Grounder) -> Iterator[Sample]:
    """Yield the samples to show.

    Raises:
        UserError: No data is named, or a row cannot be read.
    """
    if arguments.image is not None:
        yield asked(arguments, encoder, grounder)
        return
    rows = [
        (table, int(row))
        for table in open_tables(chosen_datasets(arguments), arguments.data_seed, arguments.data_cache_dir)
        for row in table.rows[: arguments.limit]
    ]
    for table, row in rows[: arguments.limit]:
        yield from table.table[row]


def asked(arguments: AttentionArguments, encoder: SampleEncoder, grounder: Grounder) -> Sample:
    """Return ``--image`` and ``--prompt`` as a sample, with the model's answer if none is given.

    Raises:
        UserError: The image cannot be read, or the answer is empty.
    """
    question = {"from": "human", "value": f"<image>\n{arguments.prompt}"}
    record: dict[str, Any] = {"image": str(Path(str(arguments.image)).resolve())}
    sample = Sample(Origin("--image", str(arguments.image), 1), record, "", allow_absolute=True)
    answer = arguments.answer
    if answer is None:
        record["conversations"] = [question, {"from": "gpt", "value": "..."}]
        answer = grounder.ask(open_example(sample, encoder).prompt, arguments.decoding)
        logger.info("The model answers: %s", answer)
    if not answer.strip():
        raise UserError("the answer is empty, so there is no attention to draw. Give an answer by --answer.")
    record["conversations"] = [question, {"from": "gpt", "value": answer}]
    return sample


def show(
    sample: Sample,
    arguments: AttentionArguments,
    encoder: SampleEncoder,
    grounder: Grounder,
    chosen: tuple[list[int], list[int]],
) -> Shown:
    """Run a sample and return its part of the page.

    Args:
        sample: Sample with an answer.
        arguments: Flags of the tool.
        encoder: Encoder of the model.
        grounder: Model with attention maps.
        chosen: Indices of the layers among those with maps, and numbers of the heads.

    Raises:
        SampleError: The sample cannot be used, or a phrase is not in its answer.
    """
    media = encoder.reader(sample, keep_images=True)
    try:
        plan = encoder.plans(sample, media)[-1]
        (encoded,) = encoder.encode([plan], sample, media)
        reader = grounder.mask_reader(encoder)
        items = wanted(sample, arguments, plan)
        places = [reader.place(item, sample, plan) for item in items]
    except SampleError as error:
        raise error.at(sample.origin) from error
    plans = [plan.media[place.medium] for place in places]
    images = [one for one in plans if isinstance(one, ImagePlan)]
    found = grounder.masks(encoded, places, [one.size for one in images]) if grounder.readout else [None] * len(places)
    tokens = [replace(place, tokens=(token,)) for place in places for token in place.tokens]
    maps = iter(_maps(grounder, encoded, [*places, *(tokens if arguments.per_token else ())], chosen))
    own = [next(maps) for _ in places]
    phrases = []
    for place, item, image, mask, weights in zip(places, items, images, found, own, strict=True):
        pixels = media.read_image(image.item)
        expected = read_mask(item["segmentation"], image.size).pixels() if item.get("segmentation") else None
        parts = [
            Looked(_word(plan, token, grounder), pixels, next(maps))
            for token in (place.tokens if arguments.per_token else ())
        ]
        phrases.append(Looked(place.phrase, pixels, weights, mask, expected, parts))
    texts = {role: " ".join(m.text for m in plan.conversation.messages if m.role == role) for role in _SPEAKERS}
    return Shown(str(sample.origin), texts["user"], texts["assistant"], phrases)


def wanted(sample: Sample, arguments: AttentionArguments, plan: Plan) -> list[dict[str, Any]]:
    """Return the phrases to show of a sample, in the form of its ``masks``."""
    if arguments.phrases is not None:
        return [{"phrase": phrase} for phrase in arguments.phrases.split(",") if phrase.strip()]
    if sample.record.get("masks"):
        return list(sample.record["masks"])
    answers = [message.text for message in plan.conversation.messages if message.role == "assistant"]
    return [{"answer": number, "span": [0, len(text)]} for number, text in enumerate(answers) if text.strip()]


def _maps(
    grounder: Grounder, encoded: EncodedSample, places: Sequence[Place], chosen: tuple[list[int], list[int]]
) -> list[np.ndarray]:
    layers, heads = chosen
    return [one.numpy()[layers][:, heads] for one in grounder.maps(encoded, places)]


def _word(plan: Plan, token: int, grounder: Grounder) -> str:
    text: str = grounder.chat_model.processor.tokenizer.decode(plan.tokens.input_ids[token : token + 1])
    return text.strip() or repr(text)
