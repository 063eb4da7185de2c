"""Freeze parts of the model (``--tune_mm_*``), count parameters, and set gradient checkpointing to match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from qwenvl.models.mtp.layer import is_mtp, mtp_of
from qwenvl.models.parts import language_model, mergers, output_head, vision_tower
from qwenvl.models.task_module import Readout, is_readout, readout_of
from qwenvl.models.trainable.sharded_params import full_size
from qwenvl.utils.errors import UserError

ModuleGroup = Literal["vision", "merger", "language", "mtp", "head"]
GROUPS: tuple[ModuleGroup, ...] = ("vision", "merger", "language", "mtp", "head")


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """Sizes and learning rate of a module group.

    Args:
        module: Module group.
        trainable: Number of trainable elements.
        total: Number of all elements; a tensor shared by two modules counts once.
        learning_rate: Peak learning rate of its parameters, if known.
    """

    module: ModuleGroup
    trainable: int
    total: int
    learning_rate: float | None = None


def parameter_modules(model: PreTrainedModel) -> dict[str, ModuleGroup]:
    """Return the module group of every parameter, by its name.

    ``merger``: the mergers, including DeepStack's. ``vision``: the rest of the tower. ``head``: the module of a task
    (:mod:`qwenvl.models.task_module`). ``mtp``: the layer for multi-token prediction, in a model that trains it.
    ``language``: everything else: language model, embeddings, ``lm_head`` (tied or not).

    The group depends on the module that holds a parameter, not on its name; a tied tensor appears once.
    """
    merger = {id(parameter) for module in mergers(model) for parameter in module.parameters()}
    vision = {id(parameter) for parameter in vision_tower(model).parameters()} - merger
    groups: dict[str, ModuleGroup] = {}
    for name, parameter in model.named_parameters():
        key = id(parameter)
        part: ModuleGroup = "merger" if key in merger else "vision" if key in vision else "language"
        groups[name] = "head" if is_readout(name) else "mtp" if is_mtp(name) else part
    return groups


def set_model(
    model: PreTrainedModel, *, tune_mm_vision: bool, tune_mm_mlp: bool, tune_mm_llm: bool, adapted: bool = False
) -> list[ModuleSummary]:
    """Set ``requires_grad`` of every parameter by the three switches.

    Args:
        model: Stock model.
        tune_mm_vision: Whether to train the vision tower except its mergers.
        tune_mm_mlp: Whether to train the mergers, including DeepStack's.
        tune_mm_llm: Whether to train the language model, its embeddings and ``lm_head``, tied or not.
        adapted: Whether adapters, the MTP layer or the module of a task train, so that the switches may all be off.

    Returns:
        A summary of each module group.

    Raises:
        UserError: No parameter is trainable.
    """
    switches: dict[ModuleGroup, bool] = {"vision": tune_mm_vision, "merger": tune_mm_mlp, "language": tune_mm_llm}
    switches["head"] = switches["mtp"] = True
    groups = parameter_modules(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # quantized weights cannot train
            parameter.requires_grad_(switches[groups[name]])
    rows = summarize(model)
    if not adapted and not any(row.trainable for row in rows):
        raise UserError(
            "No parameter trains: --tune_mm_vision, --tune_mm_mlp and --tune_mm_llm are all False. Set one to True."
        )
    return rows


def freeze_unused(model: PreTrainedModel, readout: Readout) -> None:
    """Freeze the layers that get no gradient because the module of a task does not depend on them.

    These are the vocabulary projection, which does not run (a tied one trains as the embeddings), and the layers above
    the hidden states that the module reads.
    """
    head = output_head(model)
    if head.weight is not model.get_input_embeddings().weight:
        head.weight.requires_grad_(False)
    for module in readout.unused(language_model(model)):
        module.requires_grad_(False)


def refuse_unused(model: PreTrainedModel) -> None:
    """Refuse adapters that would get no gradient.

    Raises:
        UserError: Some are in layers that the module of a task does not depend on.
    """
    readout = readout_of(model)
    for module in () if readout is None else readout.unused(language_model(model)):
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise UserError(
                "--lora_target names layers above --hidden_layer, whose adapters would never train. Read the last "
                "layer (--hidden_layer -1), or name the layers below by a regular expression."
            )


def summarize(model: PreTrainedModel, learning_rates: Mapping[ModuleGroup, float] | None = None) -> list[ModuleSummary]:
    """Count the parameters of each module group.

    Args:
        model: Stock model, whole or partitioned by ZeRO-3.
        learning_rates: Peak learning rate of each trainable module group.
    """
    trainable = dict.fromkeys(GROUPS, 0)
    total = dict.fromkeys(GROUPS, 0)
    groups = parameter_modules(model)
    parts = set(groups.values())
    assert parts >= {"vision", "merger", "language"}, "a model family without a tower, a merger or a language model"
    for name, parameter in model.named_parameters():
        count = full_size(parameter)
        total[groups[name]] += count
        trainable[groups[name]] += count if parameter.requires_grad else 0
    rates = learning_rates or {}
    return [
        ModuleSummary(group, trainable[group], total[group], rates.get(group)) for group in GROUPS if group in parts
    ]


def checkpointed_parts(model: PreTrainedModel) -> list[ModuleGroup]:
    """Return the parts with gradient checkpointing, after :func:`configure_checkpointing`."""
    parts: dict[ModuleGroup, nn.Module] = {"language": language_model(model), "vision": vision_tower(model)}
    return [
        name
        for name, part in parts.items()
        if any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
    ]


CheckpointedParts = Literal["language", "vision", "both"]


def configure_checkpointing(model: PreTrainedModel, parts: CheckpointedParts | None) -> None:
    """Turn gradient checkpointing on in the requested parts if it saves memory there, and off elsewhere.

    Vision blocks are checkpointed only if the tower without its mergers has trainable parameters: frozen blocks keep no
    activations, so recomputing them would be wasted work. Checkpointing is non-reentrant, which needs no input that
    requires a gradient and keeps all gradients with any combination of switches.

    Call after :func:`set_model`, and keep ``TrainingArguments.gradient_checkpointing`` off: the Trainer would turn it
    on for the whole model, including a frozen tower.

    Args:
        model: Stock model.
        parts: Parts to checkpoint; None for none.
    """
    groups = parameter_modules(model)
    tower_trains = any(
        parameter.requires_grad and groups[name] == "vision" for name, parameter in model.named_parameters()
    )
    wanted = {
        language_model(model): parts in ("language", "both"),
        vision_tower(model): parts in ("vision", "both") and tower_trains,
    }
    if any(wanted.values()):
        _enable_checkpointing(model)
    for module, checkpointed in wanted.items():
        if not checkpointed:
            _disable_checkpointing(module)
    mtp = mtp_of(model)
    layers: Any = () if mtp is None else mtp.layers  # of the language model's kind, but outside of it
    for layer in layers:
        layer.gradient_checkpointing = parts in ("language", "both")


def _enable_checkpointing(model: PreTrainedModel) -> None:
    """Checkpoint every layer; transformers renamed the method between 5.19 and 5.23."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    # Enabling also makes the embeddings' output require a gradient, which only reentrant checkpointing needs. It would
    # build a graph through frozen layers.
    model.disable_input_require_grads()


def _disable_checkpointing(module: PreTrainedModel) -> None:
    """Stop checkpointing in a model or a part of it."""
    if hasattr(module, "activation_checkpointing_disable"):
        module.activation_checkpointing_disable()
    else:
        module.gradient_checkpointing_disable()
