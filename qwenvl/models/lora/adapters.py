"""LoRA through PEFT: which layers get adapters, and what else trains beside them.

Adapters are put into the stock model in place; it keeps its class, its hooks and the names of its parts. What trains
whole beside them (``--tune_mm_mlp``) trains in place too. Only files have PEFT's form: see
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
    """What kind of adapters, and where.

    Args:
        target: ``language``, ``vision``, ``merger``, several of them with commas, ``all``, or a regular expression
            that the whole names of linear layers match.
        r: rank.
        alpha: scale; adapters count alpha / r, with rsLoRA alpha / sqrt(r).
        dropout: before the adapters, 0 to below 1.
        use_dora: train magnitude and direction of each weight apart.
        use_rslora: scale by the square root of the rank.
    """

    target: str
    r: int
    alpha: float
    dropout: float
    use_dora: bool = False
    use_rslora: bool = False


def add_adapters(model: PreTrainedModel, settings: AdapterSettings) -> list[str]:
    """Give linear layers adapters; parameters that train already go on training.

    Args:
        model: a stock model after :func:`qwenvl.models.trainable.freezing.set_model`.
        settings: kind and place.

    Returns:
        Names of the adapted layers.

    Raises:
        UserError: the target matches no layer, or one that cannot have an adapter, or one that trains whole already.
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
    # `model.add_adapter` does no more, but refuses a PEFT that is older than the one transformers names, and 5.24 names
    # one that is not published. The mark lets a quantized base train.
    model._hf_peft_config_loaded = True
    for parameter in whole:
        parameter.requires_grad_(True)
    return layers


def targeted_layers(model: PreTrainedModel, target: str) -> list[str]:
    """Return the names of the linear layers that ``--lora_target`` means, in the model's order.

    ``language``: linear layers of the language model's blocks; ``vision``: of the tower's blocks; ``merger``: of the
    mergers. Experts of a mixture are one tensor each, not linear layers, and get none. Neither do embeddings and the
    output projection, nor a gate with one output, of which an adapter would be larger than the weight.

    Raises:
        UserError: nothing is meant, or something that cannot have an adapter.
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
    """Whether a module is one of stacked experts: [experts, out, in], or partitioned by ZeRO-3."""
    shapes = (getattr(parameter, "ds_shape", parameter.shape) for parameter in module.parameters(recurse=False))
    return any(len(shape) == 3 for shape in shapes)


def count_experts(model: PreTrainedModel) -> int:
    """Return how many weights the stacked experts of a mixture hold; 0 for other models."""
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
    r"""Return what PEFT's ``target_modules`` has to be: a short pattern where one means just these, else the list.

    Args:
        wanted: names of layers.
        names: of all modules.

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
    """Whether a parameter of this name belongs to an adapter: PEFT names all of LoRA's so."""
    return ".lora_" in name


def trains_whole(name: str) -> bool:
    """Whether a parameter of this name, if it trains, is one of the checkpoint's own."""
    return not is_adapter(name) and not is_row(name) and not is_readout(name)


def count_adapted_layers(model: PreTrainedModel) -> int:
    """Return how many linear layers have an adapter."""
    return sum(name.endswith(".lora_A") for name, _ in model.named_modules())


def adapter_sizes(model: PreTrainedModel) -> dict[Part, int]:
    """Return the elements of the adapters' matrices of each module group; groups without adapters are left out."""
    sizes: dict[Part, int] = {}
    groups = parameter_modules(model)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and ".lora_magnitude_vector" not in name:
            part = groups[name]
            assert part != "head", "adapters sit in the model's own layers"
            sizes[part] = sizes.get(part, 0) + full_size(parameter)
    return sizes


def trained_in_float32(model: nn.Module) -> None:
    """Keep what trains in float32: steps of bfloat16 weights are lost where they are smaller than its last digit."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
