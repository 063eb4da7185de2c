"""Write and read folders of adapters in PEFT's format.

``PeftModel`` opens them: ``modules_to_save`` lists the modules that were trained in full beside the adapters, and
``trainable_token_indices`` the rows of added tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from qwenvl.families import OLDER_NAMES
from qwenvl.models.loading import read_model_type
from qwenvl.models.lora.adapters import is_adapter, trains_whole
from qwenvl.models.lora.experts import peft_name
from qwenvl.models.task_module import is_readout
from qwenvl.models.token_rows import is_row, row_layers
from qwenvl.models.trainable.sharded_params import full_tensor_cpu
from qwenvl.utils.errors import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""Names that PEFT gives a folder's files."""

TRAINED_CONFIG = "trained_config.json"
"""File of the model's config in training, whose context may be extended.

With a ``config.json``, transformers would take the folder for that of a whole model.
"""

_PREFIX = "base_model.model."
_LISTED = 6


def start_anew(checkpoint: str | Path) -> str:
    """Return, for a message, how to train on from a checkpoint's weights if its run cannot be resumed."""
    if (Path(checkpoint) / CONFIG_FILE).is_file():
        return (
            "start anew from its weights, with a new optimizer: merge the adapters (python tools/merge_lora.py "
            f"--adapter {checkpoint} --output MERGED), then --model_name_or_path MERGED and another --output_dir"
        )
    return (
        f"start anew from its weights, with a new optimizer: --model_name_or_path {checkpoint} and another --output_dir"
    )


def saved_names(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return every trainable parameter by its name in PEFT's files, in the model's order.

    Parameters of a task's module are left out; they are in files of their own (:mod:`qwenvl.tasks.files`).
    """
    names: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_readout(name):
            if is_adapter(name):  # PEFT leaves the adapter's own name out
                name = peft_name(name).replace("vector.default.weight", "vector").replace(".default.", ".")
            elif is_row(name):
                name = f"{name.rpartition('.')[0]}.token_adapter.trainable_tokens_delta"
            names[f"base_model.model.{name}"] = parameter
    return names


def collect(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return copies of the trained tensors on the host, under the names of :func:`saved_names`.

    Every rank must call it. Tensors sharded by ZeRO-3 or FSDP are gathered one at a time; frozen weights never are.
    """
    return {name: full_tensor_cpu(parameter) for name, parameter in saved_names(model).items()}


def save(model: PreTrainedModel, folder: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Write a folder that PEFT opens.

    Args:
        model: Model with adapters.
        folder: Output folder; created if it does not exist.
        weights: Result of :func:`collect`.
    """
    config = model.peft_config["default"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(folder)
    config.inference_mode = False
    described = copy.deepcopy(model.config)
    if hasattr(described, "quantization_config"):
        del described.quantization_config  # frozen weights are quantized in training only, not for merging
    described.to_json_file(Path(folder) / TRAINED_CONFIG)


def describe_base(model: PreTrainedModel, base: str) -> None:
    """Complete the adapters' config: path of the base, modules trained in full, and rows of added tokens.

    Args:
        model: Model with adapters, with ``requires_grad`` of all other parameters set.
        base: Checkpoint that the adapters were trained on; a folder becomes its absolute path.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.modules_to_save = list(_whole_modules(model, "")) or None
    rows = row_layers(model)
    config.trainable_token_indices = {name.rpartition(".")[2]: layer.row_ids for name, layer in rows} or None


def _whole_modules(module: nn.Module, name: str) -> Iterator[str]:
    """Yield the largest modules trained in full; descend into containers without a ``forward`` of their own."""
    own = {key: value for key, value in module.named_parameters() if trains_whole(key)}
    if not any(value.requires_grad for value in own.values()):
        return
    all_train = len(own) == len(list(module.parameters())) and all(value.requires_grad for value in own.values())
    if all_train and not isinstance(module, nn.ModuleList):  # which PEFT does not take
        yield name
        return
    for child, part in module.named_children():
        yield from _whole_modules(part, f"{name}.{child}" if name else child)


def load(model: PreTrainedModel, folder: str | Path) -> None:
    """Load the trained weights from a folder that :func:`save` wrote into the same kind of model.

    Args:
        model: Model with adapters, not sharded; changed in place.
        folder: Folder of a checkpoint.

    Raises:
        UserError: Names or shapes differ from the model's.
    """
    path, wanted = Path(folder) / WEIGHTS_FILE, saved_names(model)
    with safe_open(path, "pt") as file, torch.no_grad():
        require_same_names(path, set(file.keys()), set(wanted))
        for name, parameter in wanted.items():
            value = file.get_tensor(name)
            if value.shape != parameter.shape:
                shapes = f"{list(value.shape)} there, {list(parameter.shape)} here"
                raise UserError(f"{path}: {name} has another shape, {shapes}: was --lora_r another one?")
            parameter.copy_(value)


def newer_name(name: str) -> str:
    """Return the current name of an adapter tensor, which may have a name from older versions of transformers."""
    own = name.removeprefix(_PREFIX)
    for pattern, replacement in OLDER_NAMES.items():
        own = re.sub(pattern, replacement, own)
    return _PREFIX + own if name.startswith(_PREFIX) else name


def require_same_names(path: Path, saved: Set[str], wanted: Set[str]) -> None:
    """Refuse a file of adapters that does not fit the model.

    Raises:
        UserError: Names are missing or unknown.
    """
    missing, unknown = sorted(wanted - saved), sorted(saved - wanted)
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:_LISTED])}{' ...' if len(names) > _LISTED else ''})"
            for names, what in ((missing, "are missing"), (unknown, "fit nothing"))
            if names
        ]
        raise UserError(f"{path}: of its tensors {' and '.join(parts)}. It was saved from adapters of other layers.")


def read_config(folder: str | Path, base: str, **origin: Any) -> PretrainedConfig:
    """Return the config of the model that adapters were trained on; the base's, if PEFT alone wrote the folder.

    Args:
        folder: Folder of adapters.
        base: Checkpoint of the base model.
        origin: Keyword arguments of ``from_pretrained`` (``cache_dir``, ...).
    """
    if (Path(folder) / TRAINED_CONFIG).is_file():
        return AutoConfig.from_pretrained(folder, _configuration_file=TRAINED_CONFIG, **origin)
    return AutoConfig.from_pretrained(base, **origin)


def find_base(folder: str | Path, base: str | None = None, cache_dir: str | None = None) -> str:
    """Return the base checkpoint of a folder of adapters, after a check that it exists.

    Args:
        folder: Folder of adapters.
        base: Path of the checkpoint, from ``--base``; None for the one that the folder names.
        cache_dir: Folder of downloads.

    Raises:
        UserError: The folder holds no adapters or does not name their checkpoint, or the checkpoint does not exist.
    """
    named = base or read_base(folder)
    try:
        read_model_type(named, cache_dir)
    except UserError as error:
        if base is not None:
            raise UserError(str(error).replace("--model_name_or_path", "--base", 1)) from error
        why = str(error).removeprefix(f"--model_name_or_path {named}: ")
        raise UserError(
            f"{folder} holds adapters on {named} (base_model_name_or_path of its {CONFIG_FILE}), which cannot be "
            f"opened: {why} Name that checkpoint where it is now: --base FOLDER."
        ) from error
    return named


def read_base(folder: str | Path) -> str:
    """Return the checkpoint that a folder of adapters belongs to.

    Raises:
        UserError: The folder holds no adapters, or does not name their checkpoint.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} holds no adapters: {path.name} cannot be read ({error}).") from error
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{path} does not name the checkpoint it belongs to (base_model_name_or_path): name it by --base FOLDER."
        )
    return base
