"""The page of the most suspect samples: what the model sees, its loss of each token, and buttons to keep or drop."""

from __future__ import annotations

import json
import logging
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from qwenvl.cli.inference_args import open_asking_encoder, open_model
from qwenvl.cli.rank_samples.arguments import RankArguments
from qwenvl.cli.rank_samples.lists import Lists
from qwenvl.cli.view_data import site
from qwenvl.cli.view_data.images import ImageFiles
from qwenvl.cli.view_data.pieces import pieces_of
from qwenvl.cli.view_data.samples import Look, Presenter, look_at
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import open_processor
from qwenvl.data.types import Sample
from qwenvl.evaluate.ranking import REASONS, Key, Ranked
from qwenvl.inference.generate import processor_folder
from qwenvl.inference.loss import token_losses
from qwenvl.inference.prompts import EvalExample, open_example
from qwenvl.report.html import style
from qwenvl.utils.cache import fingerprint
from qwenvl.utils.errors import SampleError, UserError

logger = logging.getLogger("qwenvl.rank_samples")

TITLE = "Suspect samples"

_FIGURES = {
    "excess": "loss above its like",
    "last_loss": "last loss in training",
    "times": "times trained",
    "loss": "loss",
    "loss_blank": "with a blank image",
    "loss_swapped": "with another image",
}


def write_page(
    arguments: RankArguments, ranked: Sequence[Ranked], drop: set[Key], lists: Lists, folder: Path
) -> Path | None:
    """Write the page; return its path, or None where there is no processor to show samples with.

    Args:
        arguments: Flags of the tool.
        ranked: Samples to show, in order.
        drop: Samples that are dropped.
        lists: Annotations of the samples.
        folder: Folder of the page.

    Raises:
        UserError: The folder cannot be used, or the processor is broken.
    """
    model = _model_of(arguments)
    if model is None:
        logger.warning("There is no page: give --model_name_or_path, or keep the losses in the folder of their model.")
        return None
    opened = replace(arguments, model_name_or_path=model)
    encoder = open_asking_encoder(opened)
    processor: Any = open_processor(processor_folder(model, arguments.base))
    site.clear(folder)
    samples = [_sample(lists, one) for one in ranked]
    losses = _losses(opened, encoder, [one for one in samples if isinstance(one, Sample)])
    files = site.SampleFiles(folder)
    presenter = Presenter(encoder, processor.tokenizer, ImageFiles(folder))
    for number, (one, sample) in enumerate(zip(ranked, samples, strict=True), start=1):
        for look in _looks(sample, encoder):
            files.add(_record(presenter, one, look, losses.get(one.key)) | {"rank": _rank(number, one, drop)})
    files.close(TITLE)
    ranking = fingerprint(*((json.dumps(one.as_dict()), one.key in drop) for one in ranked))
    shown = f"token losses under {model}" if losses else "without losses of tokens: the model cannot be opened"
    _write_files(folder, ranking, f"The first {len(ranked):,} samples of the list; {shown}.")
    return folder / "index.html"


def _model_of(arguments: RankArguments) -> str | None:
    """Return the folder of the processor: the model's, or that of the run that wrote the losses."""
    if arguments.model_name_or_path:
        return arguments.model_name_or_path
    folder = Path((arguments.sample_losses or [""])[0]).parent
    return str(folder) if any((folder / name).exists() for name in ("config.json", "adapter_config.json")) else None


def _sample(lists: Lists, one: Ranked) -> Sample | SampleError:
    try:
        return lists.sample(one.key)
    except SampleError as error:
        return error


def _losses(arguments: RankArguments, encoder: SampleEncoder, samples: Sequence[Sample]) -> Mapping[Key, Tensor]:
    """Return the token losses of the shown samples; none where the model has a head, or cannot be opened."""
    if encoder.targets is not None:
        return {}
    try:
        chat_model = open_model(arguments, encoder)
    except UserError as error:
        logger.warning("The page has no losses of tokens: %s", error)
        return {}
    found: dict[Key, Tensor] = {}
    examples = list(_examples(encoder, samples))
    for start in range(0, len(examples), arguments.batch_size):
        keys, batch = zip(*examples[start : start + arguments.batch_size], strict=True)
        found |= zip(keys, token_losses(chat_model, batch), strict=True)
    return found


def _examples(encoder: SampleEncoder, samples: Sequence[Sample]) -> Iterator[tuple[Key, EvalExample]]:
    for sample in samples:
        place = sample.origin
        try:
            yield (place.dataset, place.file, place.line, place.member), open_example(sample, encoder)
        except SampleError:  # the card says so
            continue


def _looks(sample: Sample | SampleError, encoder: SampleEncoder) -> list[Look]:
    if isinstance(sample, Sample):
        return look_at(sample, encoder)
    assert sample.origin is not None, sample
    return [Look(sample.origin, None, None, ((sample.category, sample.reason),))]


def _record(presenter: Presenter, one: Ranked, look: Look, losses: Tensor | None) -> dict[str, Any]:
    """Return the record of a card: that of the viewer, with the reasons and, in the last training row, token losses."""
    record = presenter.record(look)
    record["problems"] = [[name, f"{REASONS[name]}."] for name in one.reasons] + record["problems"]
    if losses is not None and look.plan is not None and look.row == look.rows:
        record["runs"] = pieces_of(look.plan.tokens, presenter.tokenizer, losses.tolist())
    return record


def _rank(number: int, one: Ranked, drop: set[Key]) -> dict[str, Any]:
    """Return what the buttons need: the place of the sample, and whether the list drops it."""
    line = one.as_dict()
    figures = [f"{title} {line[name]:.3g}" for name, title in _FIGURES.items() if name in line]
    place = {name: line[name] for name in ("dataset", "file", "line", "member") if name in line}
    return {"number": number, "score": line["score"], "figures": figures, "place": place, "keep": one.key not in drop}


def _write_files(folder: Path, ranking: str, lead: str) -> None:
    here, viewer = Path(__file__).parent, Path(site.__file__).parent
    values = {
        "title": TITLE,
        "ranking": ranking,
        "lead": escape(lead),
        "style": style() + "".join(one.read_text("utf-8") for one in (viewer / "viewer.css", here / "ranking.css")),
    }
    template = string.Template((here / "ranking.html").read_text(encoding="utf-8"))
    (folder / "index.html").write_text(template.substitute(values), encoding="utf-8")
    for file in (viewer / "viewer.js", viewer / "cards.js", here / "ranking.js"):
        shutil.copyfile(file, folder / file.name)
