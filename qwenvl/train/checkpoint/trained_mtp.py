"""Save the layer for multi-token prediction of a model that trains it (``--train_mtp``).

transformers does not know the layer, and would store its experts as those of the model, which Qwen3.5-35B-A3B does not:
the layer is gathered and written by itself, under the names of the starting checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qwenvl.models.mtp.files import split_experts, stores_single_experts
from qwenvl.models.mtp.layer import is_mtp
from qwenvl.models.trainable.sharded_params import full_tensor_cpu
from qwenvl.train.checkpoint.folder_check import read_headers
from qwenvl.train.checkpoint.weight_files import add_tensors


def collect(model: Any) -> dict[str, Tensor]:
    """Return the layer's tensors, copied to the host; empty if the model does not train it. Every rank must call it."""
    return {name: full_tensor_cpu(value) for name, value in model.named_parameters() if is_mtp(name)}


def without_mtp(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the layer's tensors."""
    return {name: value for name, value in state_dict.items() if not is_mtp(name)}


def save(folder: Path, tensors: Mapping[str, Tensor], source: Collection[str], max_bytes: int) -> None:
    """Add the layer to the weights in a folder, in files of its own; do nothing without a layer.

    Args:
        folder: Folder of a model that was just saved.
        tensors: Result of :func:`collect`.
        source: Names of the starting checkpoint's tensors.
        max_bytes: Largest size of one new file in bytes.
    """
    if not tensors:
        return
    named = split_experts(tensors) if stores_single_experts(source) else tensors
    file = folder / "mtp.safetensors"
    save_file(dict(named), file, metadata={"format": "pt"})
    add_tensors(folder, read_headers([file]), max_bytes)
    file.unlink()
