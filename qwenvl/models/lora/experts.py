"""LoRA of stacked experts, whose weights are one tensor [experts, out, in] rather than linear layers.

Each expert e of a projection gets a pair of its own: W_e + scale * B_e A_e. The pairs are parameters of the module that
holds the weights, in the layout of PEFT's ``target_parameters``, which saves and opens them. They are applied as those
of linear layers are, W_e x + scale * B_e (A_e x), by a grouped product over the rows sent to each expert. PEFT's own
layer adds scale * B A to the weights in each forward pass instead: that takes the memory of all experts of the layer
once more, rounds the sum to the type of the weights, and under ZeRO-3 reads weights that are not gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, _grouped_mm

from qwenvl.models.parts import decoder_layers
from qwenvl.models.trainable.sharded_params import full_size

PROJECTIONS = ("gate_up_proj", "down_proj")
"""Weights of a module of stacked experts, in the order in which PEFT wraps them."""

NAME = "grouped_mm_with_adapters"
"""Name of :func:`experts_forward` in transformers' registry of implementations of experts."""


def expert_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the language model's modules that hold stacked experts; an empty list for other models."""
    layers = {id(module) for module in decoder_layers(model).modules()}
    return [name for name, module in model.named_modules() if id(module) in layers and _holds_experts(module)]


def _holds_experts(module: nn.Module) -> bool:
    return all(len(_shape(getattr(module, name, torch.empty(0)))) == 3 for name in PROJECTIONS)


def _shape(weight: Tensor) -> Sequence[int]:
    """Return the shape of a weight, partitioned by ZeRO-3 or not."""
    shape: Sequence[int] = getattr(weight, "ds_shape", weight.shape)
    return shape


def count_experts(model: PreTrainedModel) -> int:
    """Return the number of weights in the stacked experts of a mixture; 0 for other models."""
    modules = [model.get_submodule(name) for name in expert_modules(model)]
    return sum(full_size(getattr(module, name)) for module in modules for name in PROJECTIONS)


def default_expert_rank(model: PreTrainedModel, rank: int) -> int:
    """Return the rank of each expert's adapter where none is given: ``rank`` / experts per token, rounded up.

    A token then passes as many adapter weights as in a dense layer (Schulman et al., 2025, "LoRA Without Regret").
    """
    per_token: int = model.config.get_text_config().num_experts_per_tok
    return math.ceil(rank / per_token)


def add_expert_adapters(model: PreTrainedModel, names: Sequence[str], rank: int, scale: float) -> None:
    """Add adapters to stacked experts; A is initialised as by PEFT, B is zero.

    Args:
        model: Stock model; changed in place.
        names: Names of modules, from :func:`expert_modules`.
        rank: Rank of each expert's adapter.
        scale: Factor of the product of B and A.
    """
    for name in names:
        module: Any = model.get_submodule(name)
        for projection in PROJECTIONS:
            weight = getattr(module, projection)
            experts, outputs, inputs = _shape(weight)
            options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
            down = nn.Parameter(torch.empty(rank * experts, inputs, **options))
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            module.register_parameter(f"lora_A_{projection}", down)
            module.register_parameter(
                f"lora_B_{projection}", nn.Parameter(torch.zeros(outputs, rank * experts, **options))
            )
        module.lora_scale = scale
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    model.set_experts_implementation(NAME)


def has_expert_adapters(module: nn.Module) -> bool:
    """Whether a module holds stacked experts with adapters."""
    return hasattr(module, "lora_scale")


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts with their adapters; an implementation of experts of transformers.

    Args:
        experts: Module of stacked experts, with adapters or without.
        hidden_states: [tokens, hidden].
        top_k_index: Experts of each token, int64 [tokens, k].
        top_k_weights: Weights of their outputs, [tokens, k].

    Returns:
        [tokens, hidden].
    """
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(experts.num_experts, device=chosen.device)
    ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
    rows = hidden_states[order // top_k_index.shape[-1]]
    inner = experts._apply_gate(_project(experts, "gate_up_proj", rows, ends))
    weighted = _project(experts, "down_proj", inner, ends) * top_k_weights.reshape(-1)[order, None]
    sums = weighted[torch.argsort(order)].unflatten(0, top_k_index.shape).sum(1)
    return sums.to(hidden_states.dtype)


def _project(experts: Any, projection: str, rows: Tensor, ends: Tensor) -> Tensor:
    """Return the rows [S, in], sorted by expert, times the weights of their experts: [S, out].

    Args:
        experts: Module of stacked experts.
        projection: One of :data:`PROJECTIONS`.
        rows: [S, in]; those of expert e end at ``ends[e]``.
        ends: int32 [experts].
    """
    output = _grouped_linear(rows, getattr(experts, projection), ends)
    if not has_expert_adapters(experts):
        return output
    down, up = getattr(experts, f"lora_A_{projection}"), getattr(experts, f"lora_B_{projection}")
    kind = rows.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on the meta device
    dtype = torch.get_autocast_dtype(kind) if casts else down.dtype
    # PEFT's layout: rows of A are ordered by expert, columns of B by rank
    down = down.to(dtype).unflatten(0, (experts.num_experts, -1)).transpose(1, 2)
    up = up.to(dtype).unflatten(1, (-1, experts.num_experts)).permute(2, 1, 0).contiguous()
    added = _grouped_mm(_grouped_mm(rows, down, ends), up, ends)
    return torch.add(output, added.to(output.dtype), alpha=experts.lora_scale)


def peft_name(name: str) -> str:
    """Return the name of an adapter tensor in PEFT's files; names of other parameters are not changed.

    PEFT wraps the module once for each projection, the last outermost.

    Example:
        ``mlp.experts.lora_A_gate_up_proj`` becomes ``mlp.experts.base_layer.lora_A.weight``, and
        ``mlp.experts.lora_B_down_proj`` becomes ``mlp.experts.lora_B.weight``.
    """
    module, _, own = name.rpartition(".")
    for projection, wrapper in zip(PROJECTIONS, (".base_layer", ""), strict=True):
        if own in (f"lora_A_{projection}", f"lora_B_{projection}"):
            return f"{module}{wrapper}.{own.removesuffix(f'_{projection}')}.weight"
    return name


def target_parameters(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return PEFT's ``target_parameters``: two short names if all modules are adapted, else all of them in full.

    Args:
        names: Names of the adapted modules.
        every: Names of all modules with stacked experts.
    """
    short = {".".join(name.split(".")[-2:]) for name in every}
    return [
        f"{name}.{projection}"
        for name in (short if list(names) == list(every) else names)
        for projection in PROJECTIONS
    ]
