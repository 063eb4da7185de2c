"""Parameter groups for the optimizer: a learning rate per module group, weight decay for matrices only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qwenvl.models.task_module import readout_of
from qwenvl.models.trainable.freezing import GROUPS, ModuleGroup, parameter_modules


def module_learning_rates(
    *,
    learning_rate: float,
    mm_projector_lr: float | None,
    vision_tower_lr: float | None,
    head_lr: float | None = None,
) -> dict[ModuleGroup, float]:
    """Return each module group's peak learning rate; None means ``learning_rate``, and 0 means 0.

    Args:
        learning_rate: Learning rate of the language model and of the MTP layer.
        mm_projector_lr: Learning rate of the mergers.
        vision_tower_lr: Learning rate of the vision tower without its mergers.
        head_lr: Learning rate of a task's module.
    """
    return {
        "vision": learning_rate if vision_tower_lr is None else vision_tower_lr,
        "merger": learning_rate if mm_projector_lr is None else mm_projector_lr,
        "language": learning_rate,
        "mtp": learning_rate,
        "head": learning_rate if head_lr is None else head_lr,
    }


def parameter_groups(
    model: PreTrainedModel,
    *,
    learning_rate: float,
    weight_decay: float,
    mm_projector_lr: float | None = None,
    vision_tower_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Divide the trainable parameters into groups for ``torch.optim``.

    Args:
        model: Stock model after :func:`qwenvl.models.trainable.freezing.set_model`.
        learning_rate: Learning rate of the language model, and of groups without their own.
        weight_decay: Weight decay of matrices; biases, norms and other vectors have none.
        mm_projector_lr: Learning rate of the mergers; None for ``learning_rate``.
        vision_tower_lr: Learning rate of the vision tower without its mergers; None for ``learning_rate``.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name`` (``vision/decay``, ``vision/no_decay``, ...);
        groups without parameters are left out. Every trainable parameter is in exactly one.
    """
    readout = readout_of(model)
    rates = module_learning_rates(
        learning_rate=learning_rate,
        mm_projector_lr=mm_projector_lr,
        vision_tower_lr=vision_tower_lr,
        head_lr=None if readout is None else readout.learning_rate,
    )
    modules = parameter_modules(model)
    members: dict[tuple[ModuleGroup, bool], list[nn.Parameter]] = {
        (group, decays): [] for group in GROUPS for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[modules[name], has_weight_decay(parameter)].append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[group],
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{group}/{'decay' if decays else 'no_decay'}",
        }
        for (group, decays), parameters in members.items()
        if parameters
    ]


def has_weight_decay(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to tensors of two or more dimensions, as in GPT-2 and nanoGPT.

    In these families the vectors are exactly the biases, the weights of norms, and the linear attention's ``A_log`` and
    ``dt_bias``. Embeddings (including the vision tower's position embedding) and convolutions decay, as in the Hugging
    Face Trainer. The Trainer selects by name, and also decays ``A_log`` and Qwen2.5-VL's vision norms.

    ZeRO-3 leaves each rank a flat empty tensor and keeps the whole parameter's shape in ``ds_shape``, which counts.
    """
    shape: Sequence[int] = getattr(parameter, "ds_shape", None) or parameter.shape
    return len(shape) > 1


def learning_rates_of(groups: Sequence[Mapping[str, Any]]) -> dict[ModuleGroup, float]:
    """Return the learning rate of each module group in ``groups``, for the table of trained modules."""
    return {group: entry["lr"] for entry in groups for group in GROUPS if entry["name"].startswith(f"{group}/")}
