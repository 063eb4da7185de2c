"""Copy tensors that transformers does not load from the starting checkpoint to saved folders.

Qwen3.5 and newer checkpoints hold a layer for multi-token prediction (``mtp.*``), which vLLM and SGLang use as a draft
model. transformers builds no module for it, so ``save_pretrained`` leaves it out, and a server with speculative
decoding would not find it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwenvl.models.mtp.layer import is_mtp, mtp_of
from qwenvl.models.quantization import SCALES, dequantize
from qwenvl.train.checkpoint.folder_check import DTYPES, Header, read_headers
from qwenvl.train.checkpoint.weight_files import add_tensors, write_json

logger = logging.getLogger(__name__)

_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
MTP_LAYERS = "mtp_num_hidden_layers"


def carried_tensors(source: Mapping[str, Header], model: Any) -> dict[str, Header]:
    """Return the tensors of a checkpoint that transformers ignores when it loads the model.

    Not the layer for multi-token prediction of a model that trains it (``--train_mtp``), which is saved with it.
    Tensors in FP8 come with their scales. If one has none to dequantize it with, none are returned: they would be
    misread next to the dequantized model.

    Args:
        source: Tensors of the checkpoint.
        model: Stock model loaded from it, whose class lists the ignored names as patterns.
    """
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    found = {name: header for name, header in source.items() if any(pattern.search(name) for pattern in patterns)}
    if mtp_of(model) is not None:
        found = {name: header for name, header in found.items() if not is_mtp(name)}
    small = {name for name, header in found.items() if header.dtype.startswith("F8")}
    return found if small <= _scaled(found) else {}


def _scaled(tensors: Mapping[str, Header]) -> set[str]:
    """Return the names of the tensors that have scales."""
    scales = {name for name, header in tensors.items() if name.endswith(SCALES) and header.dtype in DTYPES}
    return tensors.keys() & {name.removesuffix(SCALES) for name in scales}


def carry_over(folder: Path, tensors: Mapping[str, Header], max_bytes: int, dtype: torch.dtype) -> None:
    """Copy tensors into a saved folder of weights, and set the number of MTP layers in its config.

    They are copied bit for bit, and dequantized if they are in FP8.

    Args:
        folder: Folder with ``config.json`` and ``model*.safetensors``.
        tensors: Result of :func:`carried_tensors`.
        max_bytes: Largest size of one new file in bytes.
        dtype: Data type of dequantized tensors.

    Raises:
        OSError, SafetensorError: A file cannot be read or written.
    """
    if tensors:
        file = folder / "dequantized.safetensors"
        scaled = _dequantize(tensors, file, dtype)
        left = {name: header for name, header in tensors.items() if name.removesuffix(SCALES) not in scaled}
        add_tensors(folder, left | scaled, max_bytes)
        file.unlink(missing_ok=True)
    layers = _count_mtp_layers(read_headers(sorted(folder.glob("model*.safetensors"))))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text_config = config.get("text_config", config)
    if text_config.get(MTP_LAYERS, layers) != layers:
        text_config[MTP_LAYERS] = layers
        write_json(path, config)


def _dequantize(tensors: Mapping[str, Header], file: Path, dtype: torch.dtype) -> dict[str, Header]:
    """Write the dequantized tensors to a file; return them. Without any, no file is written."""
    weights = {
        name: dequantize(_read(tensors, name), _read(tensors, name + SCALES), dtype) for name in _scaled(tensors)
    }
    if not weights:
        return {}
    save_file(weights, file, metadata={"format": "pt"})
    return read_headers([file])


def _read(tensors: Mapping[str, Header], name: str) -> torch.Tensor:
    with safe_open(tensors[name].file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def log_carried(tensors: Mapping[str, Header], model: Any) -> None:
    """Log, at the start of a run, the tensors that saved folders will hold in addition to the trained model.

    Args:
        tensors: Result of :func:`carried_tensors`.
        model: Model to train; its text config may give a number of layers for multi-token prediction.
    """
    scaled = _scaled(tensors)
    copied = {name for name in tensors if name.removesuffix(SCALES) not in scaled}
    for form, names in (("bit for bit as in the checkpoint", copied), ("dequantized (scale x weight)", scaled)):
        if names:
            prefixes = ", ".join(sorted({f"{name.partition('.')[0]}.*" for name in names}))
            logger.info("Saved %s, not trained: %d tensors (%s).", form, len(names), prefixes)
    if mtp_of(model) is not None:
        return
    layers = getattr(model.config.get_text_config(), MTP_LAYERS, 0) or 0
    if layers != _count_mtp_layers(tensors):
        logger.warning(
            "config.json says %s %d, but %d such layers (mtp.layers.*) of the checkpoint can be saved with the model, "
            "and saved folders say %d. Take the published bfloat16 checkpoint to serve with multi-token prediction.",
            *(MTP_LAYERS, layers, _count_mtp_layers(tensors), _count_mtp_layers(tensors)),
        )


def _count_mtp_layers(tensors: Collection[str]) -> int:
    return len({found[1] for name in tensors if (found := _MTP_LAYER.match(name))})
