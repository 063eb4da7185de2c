"""FP8 in the form of Qwen's published FP8 checkpoints, by the operation of transformers that writes such files.

The linear layers of the language model get FP8 weights (e4m3) with a float32 scale for each block of 128 x 128; the
vision tower, embeddings, output projection, norms and layers for multi-token prediction stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from qwenvl.families import FAMILIES, OLDER_NAMES, ModelLayout, get_family
from qwenvl.models.loading import read_model_type
from qwenvl.models.moe_checkpoint import weight_files
from qwenvl.train.checkpoint.weight_files import write_json
from qwenvl.utils.errors import UserError

BLOCK = 128
"""Rows and columns of a block: those of the published checkpoints, and the only ones that servers' kernels take."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z"))
"""Layers that servers compute as one, and that therefore are quantized together or not at all."""


def require_quantizable(config: Mapping[str, Any], folder: str) -> None:
    """Refuse families whose FP8 was not tried.

    Raises:
        UserError: The family is a mixture of experts, or unknown.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.moe:
        kind = "a mixture of experts" if family is not None else "of another family"
        raise UserError(
            f"{folder} is {kind}, whose FP8 no client was tried with. Serve it unquantized; vLLM can quantize it while "
            "it loads (vllm serve --quantization fp8)."
        )


def write_fp8(folder: Path, output: Path) -> int:
    """Write the weights and the config of a folder in FP8; return the number of quantized weights.

    Args:
        folder: Folder of a whole model.
        output: Existing folder.

    Raises:
        UserError: No weight can be divided into blocks.
    """
    files = [Path(file) for file in weight_files(str(folder), {})]
    shapes = {name: shape for file in files for name, shape in _shapes(file)}
    layout = get_family(read_model_type(str(folder))).layout
    chosen = _choose(shapes, layout)
    if not chosen:
        raise UserError(f"{folder}: no layer of its language model has sides that are multiples of {BLOCK}.")
    settings = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK))
    operation: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False).get_quantize_ops()
    index, size = dict[str, str](), 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118  not a dict
                tensor = source.get_tensor(name)
                tensors |= operation.convert({name: tensor}) if name in chosen else {name: tensor}
        save_file(tensors, output / file.name, {"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        record = {"metadata": {"total_size": size}, "weight_map": index}
        write_json(output / SAFE_WEIGHTS_INDEX_NAME, record)
    _write_config(folder, output, _kept(shapes, chosen, layout))
    return len(chosen)


def _shapes(file: Path) -> Iterable[tuple[str, list[int]]]:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dict
            yield name, tensors.get_slice(name).get_shape()


def _choose(shapes: Mapping[str, list[int]], layout: ModelLayout) -> set[str]:
    """Return the names of the weights that are quantized."""
    layer = re.compile(rf"{re.escape(layout.language)}\.layers\.\d+\..*\.weight$")
    layers = {name: shape for name, shape in shapes.items() if layer.match(_current(name))}
    whole = {name for name, shape in layers.items() if len(shape) == 2 and not any(side % BLOCK for side in shape)}
    return {name for name in whole if all(other in whole for other in _fused_with(name))}


def _current(name: str) -> str:
    for older, newer in OLDER_NAMES.items():
        name = re.sub(older, newer, name)
    return name


def _fused_with(name: str) -> list[str]:
    parent, layer, _ = name.rsplit(".", 2)
    return [f"{parent}.{other}.weight" for group in _FUSED if layer in group for other in group]


def _kept(shapes: Mapping[str, list[int]], chosen: set[str], layout: ModelLayout) -> list[str]:
    """Return the names of the layers that stay whole, as readers need them."""
    matrices = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) >= 2]
    kept = [name for name in matrices if name not in chosen and _current(name) != f"{layout.embeddings}.weight"]
    return sorted({layout.head, *(name.removesuffix(".weight") for name in kept)})


def _write_config(folder: Path, output: Path, kept: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
    write_json(output / "config.json", config)
