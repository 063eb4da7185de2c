"""LoRA by PEFT: choose the layers that get adapters, and add them.

Adapters are injected into the stock model in place; it keeps its class, its hooks and the names of its submodules.
Modules trained in full beside them (``--tune_mm_mlp``) stay in place too. Only saved files have PEFT's format: see
:mod:`qwenvl.models.lora.files`.

Hu et al., 2021, "LoRA" (arXiv 2106.09685); DoRA: arXiv 2402.09353; rsLoRA: arXiv 2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qwenvl.config.lora import Part, contradiction, target_parts
from qwenvl.models.lora.experts import (
    add_expert_adapters,
    default_expert_rank,
    expert_modules,
    has_expert_adapters,
    peft_name,
    target_parameters,
)
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
        target: One of ``language``, ``experts``, ``vision`` and ``merger``, several of them with commas, ``all``, or a
            regular expression that matches whole names of linear layers and of modules of stacked experts.
        r: Rank.
        alpha: Scale; the factor of an adapter is alpha / r, with rsLoRA alpha / sqrt(r).
        dropout: Dropout probability of the adapters' input, at least 0 and below 1.
        use_dora: Whether to train magnitude and direction of each weight separately (DoRA).
        use_rslora: Whether to scale by the square root of the rank (rsLoRA).
        expert_r: Rank of each stacked expert's adapter; 0 for ``r`` / experts per token.
    """

    target: str
    r: int
    alpha: float
    dropout: float
    use_dora: bool = False
    use_rslora: bool = False
    expert_r: int = 0

    def scale(self, rank: int) -> float:
        """Return the factor of adapters of a rank."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)


def add_adapters(model: PreTrainedModel, settings: AdapterSettings) -> list[str]:
    """Add adapters to linear layers and stacked experts; parameters that are trainable already stay trainable.

    Args:
        model: Stock model after :func:`qwenvl.models.trainable.freezing.set_model`.
        settings: Kind and place of the adapters.

    Returns:
        Names of the adapted layers and modules of experts.

    Raises:
        UserError: The target matches nothing, something that cannot have such an adapter, or that is trained in full.
    """
    layers, experts = targeted_layers(model, settings.target), targeted_experts(model, settings.target)
    if experts:
        _refuse_kinds_without_experts(settings)
    if not layers and not experts:
        raise UserError(f"--lora_target {settings.target}: {model.config.model_type} has no such layers.")
    whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _refuse_trained_layers(model, layers, settings.target)
    config = _peft_config(model, settings, layers)
    if experts:
        rank = settings.expert_r or default_expert_rank(model, settings.r)
        add_expert_adapters(model, experts, rank, settings.scale(rank))
        config.target_parameters = target_parameters(experts, expert_modules(model))
        config.r = settings.r if layers else rank
        config.rank_pattern = dict.fromkeys(config.target_parameters, rank) if rank != config.r else {}
        whole += [
            parameter
            for name in experts
            for own, parameter in model.get_submodule(name).named_parameters()
            if is_adapter(f".{own}")
        ]
    for parameter in whole:
        parameter.requires_grad_(True)
    return [*layers, *experts]


def _peft_config(model: PreTrainedModel, settings: AdapterSettings, layers: Sequence[str]) -> Any:
    """Inject adapters into linear layers, freeze everything else, and return PEFT's config on the model."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        target_modules=name_pattern(layers, [name for name, _ in model.named_modules()]) if layers else [],
    )
    if layers:
        inject_adapter_in_model(config, model)
    else:
        model.requires_grad_(False)
        model.peft_config = {"default": config}
    # `model.add_adapter` does the same, but refuses a PEFT older than the version that transformers requires, and 5.24
    # requires one that is not published. The attribute lets a quantized base train.
    model._hf_peft_config_loaded = True
    return config


def targeted_layers(model: PreTrainedModel, target: str) -> list[str]:
    """Return the names of the linear layers that ``--lora_target`` selects, in the model's order.

    ``language``: linear layers of the language model's blocks; ``vision``: of the tower's blocks; ``merger``: of the
    mergers. Embeddings, the output projection and routers get no adapters, nor do gates with one output, for which an
    adapter would be larger than the weight.

    Raises:
        UserError: It is a regular expression that matches neither linear layers nor stacked experts.
    """
    groups = target_parts(target)
    linear = dict(_linear_layers(model))
    if groups is not None:
        return [name for name, group in linear.items() if group in groups]
    pattern = re.compile(target)
    found = [name for name in linear if pattern.fullmatch(name)]
    if not found and not targeted_experts(model, target):
        raise UserError(
            f"--lora_target {target!r} matches no linear layer. It has to match whole names, such as "
            f"{', '.join(list(linear)[:: max(1, len(linear) // 3)][:3])}; embeddings and lm_head have no adapters here."
        )
    return found


def targeted_experts(model: PreTrainedModel, target: str) -> list[str]:
    """Return the names of the modules of stacked experts that ``--lora_target`` selects, in the model's order."""
    groups = target_parts(target)
    if groups is not None:
        return expert_modules(model) if "experts" in groups else []
    pattern = re.compile(target)
    return [name for name in expert_modules(model) if pattern.fullmatch(name)]


def _refuse_kinds_without_experts(settings: AdapterSettings) -> None:
    """Refuse what PEFT has for linear layers alone; it would not open the adapters.

    Raises:
        UserError: The settings have dropout or DoRA.
    """
    kinds = {f"--lora_dropout {settings.dropout:g}": settings.dropout > 0, "--use_dora True": settings.use_dora}
    for flag, given in kinds.items():
        if given:
            raise UserError(
                f"{flag} with --lora_target {settings.target}: adapters of stacked experts have neither dropout nor "
                f"DoRA. Leave {flag.split()[0]} out, or the experts: --lora_target language."
            )


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, ModuleGroup]]:
    groups = parameter_modules(model)
    blocks = {id(module) for part in (decoder_layers(model), vision_tower(model)) for module in part.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in blocks and min(module.out_features, module.in_features) > 1:
            yield name, groups[f"{name}.weight"]


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


def count_adapted_experts(model: PreTrainedModel) -> int:
    """Return the number of modules of stacked experts with adapters."""
    return sum(has_expert_adapters(module) for module in model.modules())


def adapter_sizes(model: PreTrainedModel, *, per_token: bool = False) -> dict[Part, int]:
    """Return the number of elements of the adapters in each module group; groups without adapters are left out.

    Args:
        model: Model with adapters.
        per_token: Whether to count, of stacked experts, only as many as a token passes.
    """
    sizes: dict[Part, int] = {}
    groups, text = parameter_modules(model), model.config.get_text_config()
    for name, parameter in model.named_parameters():
        if is_adapter(name) and ".lora_magnitude_vector" not in name:
            part = groups[name]
            assert part != "head" and part != "mtp", "adapters sit in the model's own layers"
            size = full_size(parameter)
            if per_token and peft_name(name) != name:
                size = size * text.num_experts_per_tok // text.num_experts
            sizes[part] = sizes.get(part, 0) + size
    return sizes


def trained_in_float32(model: nn.Module) -> None:
    """Convert trainable parameters to float32: bfloat16 weights would lose updates smaller than their last digit."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
