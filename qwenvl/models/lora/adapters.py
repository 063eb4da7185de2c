"""LoRA by PEFT: choose the layers that get adapters, and add them.

Adapters are injected into the stock model in place; it keeps its class, its hooks and the names of its submodules.
Modules trained in full beside them (``--tune_mm_mlp``) stay in place too. Only saved files have PEFT's format: see
:mod:`qwenvl.models.lora.files`.

Hu et al., 2021, "LoRA" (arXiv 2106.09685); DoRA: arXiv 2402.09353; rsLoRA: arXiv 2312.03732.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qwenvl.config.lora import Part, contradiction, target_parts
from qwenvl.models.parts import decoder_layers, vision_tower
from qwenvl.models.task_module import is_readout
from qwenvl.models.token_rows import is_row
from qwenvl.models.trainable.freezing import ModuleGroup, parameter_modules
from qwenvl.models.trainable.sharded_params import full_size
from qwenvl.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Kind and place of adapters.

    Args:
        target: One of ``language``, ``vision`` and ``merger``, several of them with commas, ``all``, or a regular
            expression that matches whole names of linear layers.
        r: Rank.
        alpha: Scale; the factor of an adapter is alpha / r, with rsLoRA alpha / sqrt(r).
        dropout: Dropout probability of the adapters' input, at least 0 and below 1.
        use_dora: Whether to train magnitude and direction of each weight separately (DoRA).
        use_rslora: Whether to scale by the square root of the rank (rsLoRA).
    """

    target: str
    r: int
    alpha: float
    dropout: float
    use_dora: bool = False
    use_rslora: bool = False


def add_adapters(model: PreTrainedModel, settings: AdapterSettings) -> list[str]:
    """Add adapters to linear layers; parameters that are trainable already stay trainable.

    Args:
        model: Stock model after :func:`qwenvl.models.trainable.freezing.set_model`.
        settings: Kind and place of the adapters.

    Returns:
        Names of the adapted layers.

    Raises:
        UserError: The target matches no layer, a layer that cannot have an adapter, or one that is trained in full.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = targeted_layers(model, settings.target)
    whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _refuse_trained_layers(model, layers, settings.target)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        target_modules=name_pattern(layers, [name for name, _ in model.named_modules()]),
    )
    inject_adapter_in_model(config, model)  # freezes everything else
    # `model.add_adapter` does the same, but refuses a PEFT older than the version that transformers requires, and 5.24
    # requires one that is not published. The attribute lets a quantized base train.
    model._hf_peft_config_loaded = True
    for parameter in whole:
        parameter.requires_grad_(True)
    return layers


def targeted_layers(model: PreTrainedModel, target: str) -> list[str]:
    """Return the names of the linear layers that ``--lora_target`` selects, in the model's order.

    ``language``: linear layers of the language model's blocks; ``vision``: of the tower's blocks; ``merger``: of the
    mergers. Stacked experts of a mixture are one tensor, not linear layers, and get no adapters. Neither do embeddings,
    the output projection, and gates with one output, for which an adapter would be larger than the weight.

    Raises:
        UserError: It selects nothing, or a module that cannot have an adapter.
    """
    groups = target_parts(target)
    linear = dict(_linear_layers(model))
    if groups is not None:
        return [name for name, group in linear.items() if group in groups]
    pattern = re.compile(target)
    matched = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    refused = [name for name in matched if _holds_experts(model.get_submodule(name))]
    if refused:
        raise UserError(
            f"--lora_target {target!r} matches {refused[0]}: the experts of a mixture are one tensor, which adapters "
            "of linear layers do not fit. Adapt attention and shared experts (--lora_target language), or train the "
            "language model whole."
        )
    found = [name for name in matched if name in linear]
    if not found:
        raise UserError(
            f"--lora_target {target!r} matches no linear layer. It has to match whole names, such as "
            f"{', '.join(list(linear)[:: max(1, len(linear) // 3)][:3])}; embeddings and lm_head have no adapters here."
        )
    return found


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, ModuleGroup]]:
    groups = parameter_modules(model)
    blocks = {id(module) for part in (decoder_layers(model), vision_tower(model)) for module in part.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in blocks and min(module.out_features, module.in_features) > 1:
            yield name, groups[f"{name}.weight"]


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts [experts, out, in], partitioned by ZeRO-3 or not."""
    shapes = (getattr(parameter, "ds_shape", parameter.shape) for parameter in module.parameters(recurse=False))
    return any(len(shape) == 3 for shape in shapes)


def count_experts(model: PreTrainedModel) -> int:
    """Return the number of weights in the stacked experts of a mixture; 0 for other models."""
    modules = decoder_layers(model).modules()
    stacked = [parameter for module in modules if _holds_experts(module) for parameter in module.parameters()]
    return sum(full_size(parameter) for parameter in stacked)


def _refuse_trained_layers(model: PreTrainedModel, layers: Sequence[str], target: str) -> None:
    groups = parameter_modules(model)
    trained = {groups[f"{name}.weight"] for name in layers if model.get_submodule(name).weight.requires_grad}
    for group, flag in (("language", "tune_mm_llm"), ("merger", "tune_mm_mlp"), ("vision", "tune_mm_vision")):
        if group in trained:
            raise UserError(contradiction(flag, target))


def name_pattern(wanted: Sequence[str], names: Sequence[str]) -> str | list[str]:
    r"""Return PEFT's ``target_modules``: a short pattern if one matches exactly the wanted layers, else the list.

    Args:
        wanted: Names of layers.
        names: Names of all modules.

    Example:
        layers.0.q_proj, layers.0.k_proj, layers.1.q_proj, layers.1.k_proj become
        ``layers\.\d+\.k_proj|layers\.\d+\.q_proj``.
    """
    forms = sorted({re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in wanted})
    pattern = re.compile("|".join(forms))
    return pattern.pattern if {name for name in names if pattern.fullmatch(name)} == set(wanted) else list(wanted)


def has_adapters(model: nn.Module) -> bool:
    """Whether :func:`add_adapters` was called."""
    return bool(getattr(model, "peft_config", None))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA adapter of PEFT."""
    return ".lora_" in name


def trains_whole(name: str) -> bool:
    """Whether a parameter of this name is one of the checkpoint's own, not of adapters, added rows or a task."""
    return not is_adapter(name) and not is_row(name) and not is_readout(name)


def count_adapted_layers(model: PreTrainedModel) -> int:
    """Return the number of linear layers with an adapter."""
    return sum(name.endswith(".lora_A") for name, _ in model.named_modules())


def adapter_sizes(model: PreTrainedModel) -> dict[Part, int]:
    """Return the number of elements of the adapters in each module group; groups without adapters are left out."""
    sizes: dict[Part, int] = {}
    groups = parameter_modules(model)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and ".lora_magnitude_vector" not in name:
            part = groups[name]
            assert part != "head", "adapters sit in the model's own layers"
            sizes[part] = sizes.get(part, 0) + full_size(parameter)
    return sizes


def trained_in_float32(model: nn.Module) -> None:
    """Convert trainable parameters to float32: bfloat16 weights would lose updates smaller than their last digit."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
