"""Check that serving gives the model what training gave it, and print the arguments of vLLM and SGLang that do.

    python tools/check_serving.py --model_name_or_path output/apples --dataset_use apples
    python tools/check_serving.py --model_name_or_path Qwen/Qwen3-VL-4B-Instruct --dataset_use apples --max_pixels 9**6

For some samples of a dataset, what training feeds (token ids, positions, grids, pixels, frames) is compared with what
the folder's own processor makes of them by ``apply_chat_template``, and with what qwen-vl-utils does. Settings of
training, and the checkpoint it started from, come from the saved folder's records and the flags. Exit code 1 if
anything differs without a known reason.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import safe_open

from qwenvl.cli.data_args import TRAINING_ALONE, ToolArguments, chosen_datasets, family_and_config
from qwenvl.config import DataArguments
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.config.parsing.recipes import read_recipe
from qwenvl.data.dataset import open_tables
from qwenvl.data.encoding.encoded import EncodedSample, Plan
from qwenvl.data.encoding.processor import build_encoder, open_processor, processor_limits, with_training_limits
from qwenvl.data.types import ImageItem, Sample
from qwenvl.families import get_family
from qwenvl.models.loading import read_model_type
from qwenvl.models.lora.files import find_base
from qwenvl.models.moe_checkpoint import stored_transposed
from qwenvl.models.mtp.layer import is_mtp
from qwenvl.models.rope_scaling import context_length, read_extension
from qwenvl.serving.commands import Adapter, Served, notes, sglang_command, vllm_command
from qwenvl.serving.compare import Comparison, Finding, State, Way, causes_of
from qwenvl.serving.inputs import NOT_COMPARED, Serving, stock_target, template_inputs, training_inputs, utils_inputs
from qwenvl.serving.programs import Model, program_lines, program_notes
from qwenvl.serving.server import Server, compare_prompts
from qwenvl.serving.video_reader import working_reader
from qwenvl.train.export.client_forms import VIDEO_TEMPLATE
from qwenvl.train.resume.settings import SETTINGS_FILE
from qwenvl.utils.errors import SampleError, UserError
from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl.check_serving")

PAGE = HelpPage(
    "check_serving.py --model_name_or_path FOLDER --dataset_use NAMES [--flag VALUE ...]",
    "Compare what training feeds the model with what the folder's own processor and qwen-vl-utils make of the same "
    "samples, and print the arguments of vLLM and SGLang that keep it the same. Give training's own data flags; a "
    "folder that training saved knows them.",
    TRAINING_ALONE | {"additional_tokens"},
)
WAYS: dict[Way, Any] = {"apply_chat_template": template_inputs, "qwen-vl-utils": utils_inputs}
STYLES = {"equal": "green", "known": "yellow", "different": "bold red", "not compared": "yellow"}
RECORDED = (
    *("max_pixels", "min_pixels", "add_vision_id", "chat_template_kwargs", "model_max_length", "history", "loss_on"),
)


@dataclass
class ServingArguments(ToolArguments):
    """Flags of this tool, besides those of all tools."""

    samples: int = field(default=8, metadata={"help": "How many rows, evenly spread over the data; 0 for all."})
    model_max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a sample in training. Default: as recorded, or the context."}
    )

    server: str | None = field(
        default=None,
        metadata={"help": "Address of a running vLLM, http://localhost:8000: prompt ids are compared with its own."},
    )
    server_model: str | None = field(
        default=None, metadata={"help": "Name of the model there. Default: the only one, or the one of the folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 0:
            raise UserError(f"--samples {self.samples} must be 0 or more.")


def main(argv: list[str] | None = None) -> int:
    """Compare and print; return the exit code: 1 if something differs for a reason that is not known."""
    setup_logging("info")
    try:
        arguments = read_arguments(sys.argv[1:] if argv is None else argv)
        serving, adapter = open_serving(arguments)
        rows = list(select_samples(arguments))
        if name := working_reader():  # qwen-vl-utils would try torchcodec, whether or not it works
            os.environ.setdefault("FORCE_QWENVL_VIDEO_READER", name)
        console = Console(soft_wrap=True, highlight=False)
        limits = compare_limits(serving)
        show(console, f"limits of {arguments.model_name_or_path}", {"processor": [limits]})
        failed = limits.state == "different"
        folder = arguments.model_name_or_path
        server = Server.at(arguments.server, arguments.server_model, folder) if arguments.server else None
        for row in rows:
            failed = check(console, serving, row, server) or failed
        served = describe(arguments, serving, adapter, rows, carried=limits.state == "equal")
        settings = serving.encoder.settings
        show_commands(console, served, Model(serving.config.model_type, settings.factor, settings.family.moe), rows)
        return int(failed)
    except UserError as error:
        logger.error("%s", error)
        return 1


def read_arguments(argv: Sequence[str]) -> ServingArguments:
    """Read the flags; flags that are not given come from the saved folder's records of its training.

    Raises:
        UserError: something is wrong with them.
    """
    arguments = parse_class(ServingArguments, argv, PAGE)
    if not arguments.model_name_or_path:
        raise UserError("--model_name_or_path is missing: the folder that is to be served.")
    recorded = recorded_settings(arguments.model_name_or_path)
    names = [one.name for one in fields(DataArguments) if one.name.startswith("video_")]
    flags: list[str] = []
    for name in (*RECORDED, *names):
        if recorded.get(name) is not None:
            value = recorded[name]
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return parse_class(ServingArguments, [*flags, *argv], PAGE)


def recorded_settings(folder: str) -> dict[str, Any]:
    """Return the settings of the training that saved a folder; empty for any other folder.

    Raises:
        UserError: the record cannot be read.
    """
    recipe = Path(folder) / SETTINGS_FILE
    return read_recipe(str(recipe)) if recipe.is_file() else {}


def open_trained(arguments: ServingArguments, processor: Any) -> Any:
    """Return the processor that training started from, where it is still there; else the folder's own.

    Added tokens are in the saved one alone.
    """
    recorded = recorded_settings(arguments.model_name_or_path)
    start = str(recorded.get("model_name_or_path", ""))
    if not Path(start, "config.json").is_file() or recorded.get("additional_tokens"):
        logger.info("Chat template, tokenizer and normalisation of training are taken to be those of the folder.")
        return processor
    logger.info("Limits of training are those of training_args.yaml; it started from %s.", start)
    return open_processor(start)


def open_serving(arguments: ServingArguments) -> tuple[Serving, Adapter | None]:
    """Open the folder: of an adapter, with the config of its base model.

    Raises:
        UserError: it holds no processor, or its model's family is unknown.
    """
    adapter = read_adapter(Path(arguments.model_name_or_path), arguments.base)
    processor = open_processor(arguments.model_name_or_path)
    family, config = family_and_config(arguments, processor)
    trained = open_trained(arguments, processor)
    encoder = build_encoder(trained, config, family, arguments, arguments.model_max_length or context_length(config))
    kwargs = dict(arguments.chat_template_kwargs) | ({"add_vision_id": True} if arguments.add_vision_id else {})
    return Serving(processor, config, encoder, trained, kwargs), adapter


def read_adapter(folder: Path, base: str | None = None) -> Adapter | None:
    """Return what a folder's ``adapter_config.json`` says; None where there is none.

    Args:
        folder: Folder to be served.
        base: Base model of its adapters, where it is not where they say.

    Raises:
        UserError: it names no base model, or one that is not there.
    """
    if not (folder / "adapter_config.json").is_file():
        return None
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    below = find_base(folder, base)
    reasons = ["DoRA"] if config.get("use_dora") else []
    reasons += ["weights that were trained whole (modules_to_save)"] if config.get("modules_to_save") else []
    reasons += ["embeddings of added tokens"] if config.get("trainable_token_indices") else []
    if (folder / "adapter_model.safetensors").is_file():
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            names = list(tensors.keys())
        vision = get_family(read_model_type(below)).layout.vision
        towered = any(f".{vision}." in name for name in names)
        reasons += ["adapters of the vision tower or its merger"] if towered else []
    ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    obstacle = f"Not every server loads {' or '.join(reasons)}" if reasons else ""
    return Adapter(
        below, max(ranks), obstacle, read_extension(folder, below), for_experts=bool(config.get("target_parameters"))
    )


def select_samples(arguments: ServingArguments) -> Iterator[Sample | SampleError]:
    """Yield the samples of the chosen rows, and the error of a row that cannot be read.

    Raises:
        UserError: no dataset is named.
    """
    tables = open_tables(chosen_datasets(arguments), 0, arguments.data_cache_dir)
    rows = [(table, int(row)) for table in tables for row in table.rows]
    count = min(arguments.samples or len(rows), len(rows))
    for place in np.linspace(0, len(rows) - 1, count).round().astype(int).tolist():
        table, row = rows[place]
        try:
            yield from table.table[row]
        except SampleError as error:
            yield error


def compare_limits(serving: Serving) -> Finding:
    """Compare the pixel and frame limits of the folder's processor with those of training."""
    trained = processor_limits(with_training_limits(serving.trained, serving.encoder.settings))
    own = processor_limits(serving.processor)
    different = [
        f"{part} {name}: {_shown(trained[part][name])} in training, {_shown(own[part][name])} here"
        for part in trained
        for name in trained[part]
        if (trained[part][name] or None) != (own[part][name] or None) and not _without_effect(name, trained, own)
    ]
    detail = "; ".join(different) or "those of training"
    return Finding("pixel and frame limits", "different" if different else "equal", detail)


def _without_effect(name: str, trained: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    capped = [limits["video_processor"]["cap_pixels_per_frame"] for limits in (trained, own)]
    return name == "max_video_tokens" and not any(capped)


def _shown(value: Any) -> str:
    return f"{value['shortest_edge']} to {value['longest_edge']} pixels" if isinstance(value, dict) else str(value)


def check(console: Console, serving: Serving, sample: Sample | SampleError, server: Server | None = None) -> bool:
    """Compare one sample and print what was found; return whether something differs without a known reason."""
    try:
        if isinstance(sample, SampleError):
            raise sample
        plans = serving.encoder.plans(sample)
        rows = list(zip(plans, serving.encoder.encode(plans, sample), strict=True))
    except SampleError as error:
        console.print(f"{escape(str(error))}\n", style="bold red")
        return True
    differs = [check_row(console, serving, sample, plan, encoded, server) for plan, encoded in rows]
    return any(differs)


def check_row(
    console: Console, serving: Serving, sample: Sample, plan: Plan, encoded: EncodedSample, server: Server | None
) -> bool:
    """Compare the prompt of the last answer of a training row; return whether it differs without a known reason."""
    training = training_inputs(serving, plan, encoded)
    columns: dict[str, list[Finding]] = {}
    for way, inputs in WAYS.items():
        try:
            served = inputs(serving, plan, sample)
        except SampleError as error:
            state: State = "not compared" if error.category == NOT_COMPARED else "different"
            columns[way] = [Finding("all", state, error.reason)]
            continue
        causes = causes_of(way, serving, plan, sample, served)
        columns[way] = Comparison(serving, plan, training, served, way, causes).findings()
    if not plan.rendering.whole:
        columns["apply_chat_template"].append(compare_target(serving, plan))
    if server is not None:
        columns["server"] = compare_prompts(server, serving, plan, sample)
    answer = "" if plan.rendering.whole else f", answer {plan.rendering.turns[-1]}"
    show(console, f"{sample.origin}{answer}{_request(plan)}", columns)
    return any(finding.state == "different" for findings in columns.values() for finding in findings)


def compare_target(serving: Serving, plan: Plan) -> Finding:
    """Compare what is trained of the last answer of a row with what the folder's template writes for it."""
    served = stock_target(serving, plan)
    trained = plan.tokens.input_ids[plan.tokens.starts[-1] :].tolist()
    if served is None:
        reason = "the answer has no thought, and the prompt opens one: an empty one is trained"
        return Finding("target ids", "known", reason)
    if served == trained:
        return Finding("target ids", "equal", f"{len(trained)} tokens")
    return Finding("target ids", "different", f"{len(trained)} tokens in training, {len(served)} of the template")


def _request(plan: Plan) -> str:
    """Return the template arguments with which the answer of a training row has to be asked for."""
    arguments = plan.rendering.arguments[-1] if plan.rendering.arguments else {}
    return f", chat_template_kwargs {json.dumps(dict(arguments))}" if arguments else ""


def show(console: Console, title: str, columns: Mapping[str, Sequence[Finding]]) -> None:
    """Print a table of findings, a row for each."""
    console.print(escape(title), style="bold")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for way, findings in columns.items():
        for finding in findings:
            state = f"[{STYLES[finding.state]}]{finding.state}[/]"
            table.add_row(f"  {way}", finding.item, state, escape(finding.detail))
    console.print(table)
    console.print()


def describe(
    arguments: ServingArguments, serving: Serving, adapter: Adapter | None, rows: Sequence[Any], *, carried: bool
) -> Served:
    """Return what is to be served, as the commands need it."""
    counts, requests = {"image": 0, "video": 0}, Counter[str]()
    for row in rows:
        try:
            plans = [] if isinstance(row, SampleError) else serving.encoder.plans(row)
        except SampleError:  # reported above
            continue
        media = plans[0].conversation.media() if plans else ()
        images = sum(isinstance(item, ImageItem) for item in media)
        counts = {"image": max(counts["image"], images), "video": max(counts["video"], len(media) - images)}
        requests.update(json.dumps(dict(one)) for plan in plans for one in plan.rendering.arguments)
    settings = serving.encoder.settings
    limits = processor_limits(with_training_limits(serving.trained, settings))
    clips = settings.family.video_layout == "clip"
    length = serving.encoder.max_length
    template = Path(arguments.model_name_or_path) / VIDEO_TEMPLATE
    return Served(
        folder=arguments.model_name_or_path,
        limits=limits,
        carried=carried,
        clips=clips,
        max_length=length,
        counts=counts,
        adapter=adapter,
        requests=requests,
        rope=dict(serving.config.get_text_config().rope_parameters),
        video_template=str(template) if template.is_file() else "",
        drafts=adapter is None and _has_mtp(Path(arguments.model_name_or_path)),
    )


def _has_mtp(folder: Path) -> bool:
    """Return whether the files of a folder hold a layer for multi-token prediction; of a repository's name, False."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if any(map(is_mtp, tensors.keys())):
                return True
    return False


def show_commands(console: Console, served: Served, model: Model, rows: Sequence[Any]) -> None:
    """Print the arguments of the servers, and the lines of other programs."""
    console.print(f"Arguments that give the model what training gave it ({len(rows)} samples looked at):", style="bold")
    for command in (vllm_command(served), sglang_command(served)):
        console.print(f"\n{command}", markup=False)
    console.print()
    for name, line in program_lines(served, model).items():
        console.print(f"{name}: {line}", markup=False)
    console.print()
    for note in [*notes(served), *program_notes(served, model), *expert_notes(served, model)]:
        console.print(f"- {note}", markup=False)


def expert_notes(served: Served, model: Model) -> list[str]:
    """Return what other programs have against the layout of a folder's experts, if anything."""
    if (
        model.model_type != "qwen3_vl_moe"
        or served.adapter
        or stored_transposed(served.folder, model.model_type, {}) is not False
    ):
        return []
    return [
        "Its experts are stored as [experts, out, in], as stock transformers saves them; vLLM and llama.cpp read the "
        "published layout, [experts, in, out], alone, and vLLM norm_topk_prob in the config: folders that this trainer "
        "saves have both."
    ]
