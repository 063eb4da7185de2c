"""Merge adapters into the checkpoint they were trained on, and check the merged folder.

    python tools/merge_lora.py --adapter output/apples --output output/apples-merged

The merged folder needs no PEFT: it opens with stock transformers, vLLM or SGLang. It is read again at the end, and must
hold the merged weights bit for bit and give the same logits.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from qwenvl.config.export import shard_bytes
from qwenvl.config.parsing.command_line import HelpPage
from qwenvl.config.parsing.parser import parse_class
from qwenvl.data.encoding.processor import open_processor
from qwenvl.models.adapter_merging import TOLERANCE, distance, logits_of, merge, open_adapted, sample_inputs
from qwenvl.models.fingerprints import differing, fingerprints, listed
from qwenvl.models.lora.files import find_base
from qwenvl.models.precision import read_dtype
from qwenvl.train.checkpoint.carried_tensors import carried_tensors, carry_over, log_carried
from qwenvl.train.checkpoint.folder_check import read_source
from qwenvl.train.export.client_forms import write_client_forms
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging
from qwenvl.utils.permissions import follow_umask

logger = logging.getLogger("qwenvl.merge_lora")

PAGE = HelpPage(
    "merge_lora.py --adapter DIR --output DIR [--flag VALUE ...]",
    "Merge adapters into the checkpoint they were trained on, into a folder that loads without PEFT. Checks that every "
    "tensor of the adapters is used, that weights change, and that the logits of a sample equal those of the adapters.",
)

RECORDS = (
    *("training_args.yaml", "original_processor_limits.json", "versions.json", "data.json", "trainer_state.json"),
    "serving.json",
)
"""Files of the adapters' folder that are copied to the merged folder."""


@dataclass
class MergeArguments:
    """Flags of this tool."""

    adapter: str = field(default="", metadata={"help": "Folder of adapters: the output of a run, or a checkpoint-*."})
    output: str = field(default="", metadata={"help": "Folder to write; it must be new or empty."})
    base: str | None = field(
        default=None, metadata={"help": "Checkpoint below the adapters. Default: as in adapter_config.json."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Type of the merged weights. auto: the type of the checkpoint."}
    )
    device: str = field(default="cpu", metadata={"help": "Where to compute: cpu, cuda, cuda:1, ..."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded checkpoints."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; return the exit code."""
    setup_logging("info")
    try:
        run(parse_class(MergeArguments, sys.argv[1:] if argv is None else argv, PAGE))
    except UserError as error:
        logger.error("%s", error)
        return 1
    return 0


def run(arguments: MergeArguments) -> None:
    """Merge, save and check.

    Raises:
        UserError: Something in the input must be changed, or the merged folder fails its check.
    """
    output = Path(arguments.output)
    if not arguments.adapter or not arguments.output:
        raise UserError("Name both folders: --adapter DIR --output DIR.")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} already holds files. Choose another folder, or empty it.")
    origin: dict[str, Any] = {"cache_dir": arguments.cache_dir, "trust_remote_code": arguments.trust_remote_code}
    base = find_base(arguments.adapter, arguments.base, arguments.cache_dir)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(arguments.dtype) or read_dtype(base, **origin)
    adapted = open_adapted(base, arguments.adapter, dtype, **origin).to(arguments.device)
    own = (Path(arguments.adapter) / "processor_config.json").exists()
    processor: Any = open_processor(arguments.adapter if own else base, **origin)
    model, report = merge(adapted, processor)
    logger.info(
        "Merged: %d weights changed. Logits of a sample, in float32: the adapters move them by %.2g of their norm, "
        "merging by %.1g (tolerance %g), rounding the merged weights by %.2g.",
        *(report.changed, report.effect, report.error, TOLERANCE, report.rounding),
    )
    save(model, processor, arguments)
    carried = carried_tensors(read_source(base, **origin), model)
    carry_over(output, carried, shard_bytes(arguments.max_shard_size), model.dtype)
    log_carried(carried, model)
    follow_umask(output)
    check(model, processor, output, arguments.device)
    logger.info("Saved to %s. Stock transformers reads the same weights and logits from it.", output)


def save(model: PreTrainedModel, processor: Any, arguments: MergeArguments) -> None:
    """Write the merged folder."""
    model.save_pretrained(arguments.output, max_shard_size=arguments.max_shard_size)
    processor.save_pretrained(arguments.output)
    write_client_forms(Path(arguments.output))
    for name in RECORDS:
        if (file := Path(arguments.adapter) / name).is_file():
            shutil.copy2(file, arguments.output)
    follow_umask(Path(arguments.output))


def check(model: PreTrainedModel, processor: Any, output: Path, device: str) -> None:
    """Read the folder with stock transformers, and compare weights and logits with the merged model.

    Raises:
        UserError: Weights or logits differ from those of the merged model.
    """
    weights = fingerprints(model, model.dtype)
    for parameter in model.parameters():  # stock transformers opens all of them in one type, and leaves buffers
        parameter.data = parameter.data.to(model.dtype)
    wanted = logits_of(model, sample_inputs(processor, model.device))
    model.to("meta")  # frees memory for the second model
    again: Any = AutoModelForImageTextToText.from_pretrained(output, dtype="auto").to(device).eval()
    wrong = differing(weights, dict(again.named_parameters()))
    if wrong:
        raise UserError(f"{output}, read again, holds other weights than were merged: {listed(wrong)}. Do not use it.")
    found = logits_of(again, sample_inputs(AutoProcessor.from_pretrained(output), again.device))
    if found.shape != wanted.shape or not distance(found, wanted) <= TOLERANCE:
        raise UserError(f"{output}, read again, gives other logits than the merged model. Do not use it.")
