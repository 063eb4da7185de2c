"""Files of a task's module beside a model: ``task_head.safetensors`` (weights) and ``task.json`` (its config)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenvl.models.lora.files import start_anew
from qwenvl.models.task_module import NAME, Readout, readout_of
from qwenvl.models.trainable.sharded_params import full_tensor_cpu
from qwenvl.utils.errors import UserError

RECORD_FILE, WEIGHTS_FILE = "task.json", "task_head.safetensors"


def collect(model: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's task, copied to the host; empty without a task. Every rank has to call it."""
    readout = readout_of(model)
    return {} if readout is None else {name: full_tensor_cpu(value) for name, value in readout.named_parameters()}


def save(model: Any, folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write both files; do nothing for a model without a task.

    Args:
        model: Model with the module of the task, if it has one.
        folder: Output folder of the model.
        tensors: Tensors from :func:`collect`.
    """
    readout = readout_of(model)
    if readout is not None:
        save_file(dict(tensors), Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(dict(readout.record), indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / RECORD_FILE).write_text(text, encoding="utf-8")


def without_task(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the tensors of the task."""
    return {name: value for name, value in state_dict.items() if not name.startswith(f"{NAME}.")}


def is_task_folder(folder: str | Path) -> bool:
    """Return whether a folder holds the module of a task."""
    return (Path(folder) / RECORD_FILE).is_file()


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the content of ``task.json``.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(folder) / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}), so the folder holds no model with a task.") from error
    return record


def require_same_task(readout: Readout | None, checkpoint: str | Path) -> None:
    """Check that a checkpoint has the task of the run that resumes from it; loss and learning rate may differ.

    Raises:
        UserError: only one of them has a task, or their modules or outputs differ.
    """
    if readout is None and not is_task_folder(checkpoint):
        return
    saved = _shape(read_record(checkpoint) if is_task_folder(checkpoint) else {})
    here = _shape({} if readout is None else json.loads(json.dumps(dict(readout.record))))
    differing = [name for name in sorted(saved.keys() | here.keys()) if saved.get(name) != here.get(name)]
    if differing:
        lines = "".join(
            f"\n  {name}: {saved.get(name)} in the checkpoint, {here.get(name)} in this run" for name in differing
        )
        raise UserError(
            f"{checkpoint} was saved with another task than this run has:{lines}\nResume with the settings, data and "
            f"class names that it was saved with; or {start_anew(checkpoint)}."
        )


_MAY_CHANGE = ("loss", "class_weights", "focal_gamma", "huber_delta", "learning_rate", "seed")


def _shape(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that define the module's architecture and the meaning of its outputs."""
    flat = {**record, **record.get("settings", {})}
    return {name: value for name, value in flat.items() if name not in (*_MAY_CHANGE, "settings")}


def load(readout: Readout | None, folder: str | Path) -> None:
    """Load the weights in a folder into a module; do nothing for None.

    Args:
        readout: Module to load into, in place; not sharded.
        folder: Folder that :func:`save` wrote to.

    Raises:
        UserError: the file is missing or damaged, or belongs to another module.
    """
    if readout is None:
        return
    path = Path(folder) / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}, the weights of the task, cannot be read: {error}.") from error
    wanted = dict(readout.named_parameters())
    shapes = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (tensors, wanted))
    found, needed = shapes
    if found != needed:
        raise UserError(f"{path} was saved from another task: it holds {found}, and this one needs {needed}.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
