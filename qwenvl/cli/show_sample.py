r"""Show samples as the model sees them: rendered text with trained tokens in colour, grids, positions, timestamps.

    python tools/show_sample.py --dataset_use demo_digits --model_name_or_path MODEL --index 3
    python tools/show_sample.py --annotation_path FILE --data_path DIR --model_name_or_path MODEL --all --json OUT.jsonl

Takes the data flags of training (``--max_pixels``, ``--video_fps``, ``--add_vision_id``, ...) with the same defaults.
MODEL is a checkpoint, or a folder with a processor. ``--json`` writes one line per training row: ``id``, ``turns``,
``chat_template_kwargs``, ``input_ids``, ``labels``, ``loss_weights`` (T, if a turn has a weight), ``position_ids``
(3 x T: temporal, height, width), ``image_grid_thw``, ``video_grid_thw``, ``pixel_values`` and ``pixel_values_videos``
(shape, mean, std), or ``id`` and ``error``.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from qwenvl.cli.data_args import TRAINING_ALONE, ToolArguments, chosen_datasets, open_encoder
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.conversation.chat_template import weight_lines
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoded import EncodedSample, Plan
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.tokenization import IGNORE_INDEX
from qwenvl.data.media.locate import describe
from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.sample_stats import REMARKS
from qwenvl.data.types import Sample
from qwenvl.models.vision.patchify import Patchify
from qwenvl.utils.errors import SampleError, UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.show_sample")

PAGE = HelpPage(
    "show_sample.py --model_name_or_path MODEL --dataset_use NAMES [--flag VALUE ...]",
    "Show samples as the model sees them: the rendered text with trained tokens in green, grids, positions, "
    "timestamps. With --json, write them to a file instead. Give the data flags of training to see the same.",
    TRAINING_ALONE,
)


@dataclass
class ShowArguments(ToolArguments):
    """Flags of this tool, besides those of all tools."""

    index: int = field(default=0, metadata={"help": "Index of the row to show, from 0."})
    all: bool = field(default=False, metadata={"help": "Show every row."})
    json: str | None = field(default=None, metadata={"help": "Write JSON lines to this file instead of showing."})
    model_max_length: int = field(default=1 << 20, metadata={"help": "Most tokens of a sample."})


def main(argv: list[str] | None = None) -> int:
    """Show or write samples; return the exit code: 1 if any sample cannot be used."""
    setup_logging("info")
    try:
        arguments = parse_class(ShowArguments, sys.argv[1:] if argv is None else argv, PAGE)
        if not arguments.model_name_or_path:
            raise UserError("--model_name_or_path is missing: the checkpoint whose tokenizer and template to use.")
        encoder, processor = open_encoder(arguments, arguments.model_max_length)
        samples = list(select_samples(arguments))
        read = [sample for sample in samples if isinstance(sample, Sample)]
        for message in dict.fromkeys(event.message for sample in read for event in encoder.unread_keys(sample)):
            logger.warning("%s.", message)
        if arguments.json is not None:
            return write_json(samples, encoder, Patchify.from_processor(processor), Path(arguments.json))
        return sum(show(sample, encoder, processor.tokenizer) for sample in samples) and 1
    except UserError as error:
        logger.error("%s", error)
        return 1


def select_samples(arguments: ShowArguments) -> Iterator[Sample | SampleError]:
    """Yield the samples of the chosen rows, and the error of a row that cannot be read.

    Raises:
        UserError: No dataset is named, or it has no such row.
    """
    specs = chosen_datasets(arguments)
    rows = [(table, int(row)) for table in open_tables(specs, 42, arguments.data_cache_dir) for row in table.rows]
    if not arguments.all:
        if not -len(rows) <= arguments.index < len(rows):
            raise UserError(f"--index {arguments.index}: there are {len(rows)} rows, 0 to {len(rows) - 1}.")
        rows = [rows[arguments.index]]
    for table, row in rows:
        try:
            yield from table.table[row]
        except SampleError as error:
            yield error


def encode(sample: Sample | SampleError, encoder: SampleEncoder) -> list[tuple[Plan, EncodedSample]]:
    """Return the training rows of a sample, before and after its media are decoded.

    Raises:
        SampleError: The sample cannot be used.
    """
    if isinstance(sample, SampleError):
        raise sample
    plans = encoder.plans(sample)
    return list(zip(plans, encoder.encode(plans, sample), strict=True))


def write_json(samples: list[Sample | SampleError], encoder: SampleEncoder, patchify: Patchify, path: Path) -> int:
    """Write a line for each training row; return 1 if any sample has an error.

    Raises:
        UserError: The file cannot be written.
    """
    failed = 0
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}. Choose another file.") from error
    with file:
        for sample in samples:
            try:
                records = [_as_record(plan, encoded, patchify) for plan, encoded in encode(sample, encoder)]
            except SampleError as error:
                failed = 1
                records = [{"error": str(error)}]
            identifier = sample.origin.id if sample.origin is not None else None
            for record in records:
                file.write(json.dumps({"id": identifier, **record}, ensure_ascii=False) + "\n")
    return failed


def _as_record(plan: Plan, encoded: EncodedSample, patchify: Patchify) -> dict[str, Any]:
    is_video = [isinstance(media, VideoPlan) for media in plan.media]
    patches = [patchify(medium.frames.flatten(), [medium.shape]) for medium in encoded.media]
    record: dict[str, Any] = {
        "turns": list(plan.rendering.turns),
        "chat_template_kwargs": _arguments(plan),
        "input_ids": plan.tokens.input_ids.tolist(),
        "labels": plan.tokens.labels.tolist(),
        **({"loss_weights": plan.tokens.weights.tolist()} if plan.tokens.weights is not None else {}),
        "position_ids": plan.tokens.position_ids[1:].tolist(),
    }
    for name, grid_name, wanted in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        grids = [list(media.grid) for media, video in zip(plan.media, is_video, strict=True) if video == wanted]
        pixels = [values for values, video in zip(patches, is_video, strict=True) if video == wanted]
        record[grid_name] = grids or None
        record[name] = _statistics(torch.cat(pixels)) if pixels else None
    return record


def _arguments(plan: Plan) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the template arguments of a training row, or a list of those of each answer if they differ."""
    arguments = [dict(one) for one in plan.rendering.arguments]
    same = all(one == arguments[0] for one in arguments)
    return (arguments[0] if arguments else {}) if same else arguments


def _statistics(values: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(values.shape), "mean": values.double().mean().item(), "std": values.double().std().item()}


def show(sample: Sample | SampleError, encoder: SampleEncoder, tokenizer: Any) -> int:
    """Print one sample; return 1 if it cannot be used."""
    console = Console(soft_wrap=True, highlight=False)
    console.rule(str(sample.origin), align="left")
    try:
        rows = encode(sample, encoder)
    except SampleError as error:
        console.print(Text(f"error ({error.category}): {error.reason}", style="bold red"))
        return 1
    for number, (plan, _) in enumerate(rows, start=1):
        if len(rows) > 1:
            console.print(f"training row {number} of {len(rows)}", style="bold")
        _show_row(console, plan, tokenizer)
    return 0


def _show_row(console: Console, plan: Plan, tokenizer: Any) -> None:
    console.print(_coloured(plan, tokenizer))
    tokens = plan.tokens
    trained = int((tokens.labels != IGNORE_INDEX).sum())
    last = tokens.position_ids[1:].amax(dim=1).tolist()
    console.print(
        f"{len(tokens)} tokens, {trained} trained (green), {int(tokens.vision_mask.sum())} of media; "
        f"positions up to temporal {last[0]}, height {last[1]}, width {last[2]}",
        style="bold",
    )
    for event in (event for event in plan.events if event.kind != "unread_key"):  # logged once for all samples
        said = f"A sample {REMARKS[event.kind]}." if event.kind in REMARKS else event.message
        console.print(Text(said, style="yellow"))
    for media in plan.media:
        kind = "video" if isinstance(media, VideoPlan) else "image"
        source = media.item.source
        source = f"{len(source)} frames" if isinstance(source, tuple) else describe(source)
        shown = source if len(source) < 120 else source[:60] + "..."
        console.print(f"{kind} {shown}: {media.resized[1]} x {media.resized[0]} pixels, grid_thw {list(media.grid)}")
        if isinstance(media, VideoPlan):
            seconds = ", ".join(f"{second:.1f}" for second in media.timestamps)
            console.print(f"  source frames {media.indices.tolist()} at {media.fps:g} fps; timestamps {seconds} s")
    for turn, arguments in zip(plan.rendering.turns, plan.rendering.arguments, strict=True):
        if arguments:
            console.print(f"message {turn}: template arguments {json.dumps(dict(arguments), ensure_ascii=False)}")
    for line in weight_lines(plan.rendering):
        console.print(line)


def _coloured(plan: Plan, tokenizer: Any) -> Text:
    """Return the text as it is tokenized; runs of placeholders collapsed, trained tokens green."""
    tokens, text = plan.tokens, Text()
    marks = zip(tokens.input_ids.tolist(), (tokens.labels != IGNORE_INDEX).tolist(), tokens.vision_mask, strict=True)
    for (trained, vision), group in itertools.groupby(marks, key=lambda mark: (mark[1], bool(mark[2]))):
        ids = [mark[0] for mark in group]
        if vision:
            text.append(f"[{tokenizer.decode(ids[:1])} x {len(ids)}]", style="cyan")
        else:
            text.append(tokenizer.decode(ids), style="bold green" if trained else "dim")
    return text
