"""The MTP layer's tensors in a checkpoint's files.

A mixture's experts are stacked in memory and in Qwen3.6, as in the rest of the model; Qwen3.5 stores those of the MTP
layer one by one:

    mtp.layers.0.mlp.experts.gate_up_proj                                   [experts, 2 x width, hidden]
    mtp.layers.0.mlp.experts.N.gate_proj.weight, ...N.up_proj.weight        [width, hidden] each
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwenvl.models.mtp.layer import MTP, MultiTokenPrediction, is_mtp
from qwenvl.utils.errors import UserError

_EXPERT = re.compile(r"(mtp\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKED = re.compile(r"(mtp\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_LISTED = 4


def stores_single_experts(names: Collection[str]) -> bool:
    """Whether a checkpoint with tensors of these names stores the MTP layer's experts one by one."""
    return any(_EXPERT.fullmatch(name) for name in names)


def stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the MTP layer's experts stacked, if they are stored one by one."""
    single: dict[str, dict[str, dict[int, Tensor]]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := _EXPERT.fullmatch(name):
            single.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
        else:
            others[name] = tensor
    for prefix, parts in single.items():
        gate, up, down = (_stack(parts[part]) for part in ("gate_proj", "up_proj", "down_proj"))
        others |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    return others


def _stack(experts: Mapping[int, Tensor]) -> Tensor:
    return torch.stack([experts[number] for number in sorted(experts)])


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors with the MTP layer's experts one by one, the inverse of :func:`stack_experts`."""
    return dict(part for name, tensor in tensors.items() for part in _split(name, tensor))


def _split(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    found = _STACKED.fullmatch(name)
    if found is None:
        yield name, tensor
        return
    prefix, part = found.groups()
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    for number, expert in enumerate(tensor):
        for one, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
            yield f"{prefix}.{number}.{one}.weight", matrix.contiguous()


def read_tensors(files: Sequence[str | Path], *, on_meta: bool = False) -> dict[str, Tensor]:
    """Return the MTP tensors of a checkpoint by their names in the model, with stacked experts.

    Args:
        files: Safetensors files of the checkpoint.
        on_meta: Whether to read shapes only, into tensors on the meta device.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in filter(is_mtp, tensors.keys()):
                part = tensors.get_slice(name)
                found[name] = torch.empty(part.get_shape(), device="meta") if on_meta else tensors.get_tensor(name)
    return stack_experts(found)


def load(layer: MultiTokenPrediction, files: Sequence[str | Path], path: str) -> None:
    """Load the MTP layer of a checkpoint.

    Args:
        layer: Layer to load into, in place; not sharded. On the meta device only names and shapes are compared.
        files: Safetensors files of the checkpoint.
        path: Folder or repository of the checkpoint, for messages.

    Raises:
        UserError: The checkpoint has no such layer, or one of other names or shapes.
    """
    own = {f"{MTP}.{name}": parameter for name, parameter in layer.named_parameters()}
    found = read_tensors(files, on_meta=layer.fc.weight.is_meta)
    if not found:
        raise UserError(
            f"--train_mtp True: {path} holds no mtp.* tensors, so there is no layer for multi-token prediction to "
            "train: stock transformers leaves them out when it saves. Start from the published checkpoint, or from a "
            "folder that this trainer saved; or leave --train_mtp out."
        )
    wrong = sorted(name for name in own.keys() | found.keys() if _shape(own, name) != _shape(found, name))
    if wrong:
        listed = ", ".join(f"{name} {_shape(found, name)}" for name in wrong[:_LISTED])
        raise UserError(
            f"--train_mtp True: the mtp.* tensors of {path} are not those of one layer with full attention and no "
            f"embeddings of its own, which is what is trained here: {listed} (missing or of another shape). Leave "
            "--train_mtp out: they are then saved as they are."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
