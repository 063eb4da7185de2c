"""Linear attention of packed samples, one sample at a time, for when the varlen kernels are not installed.

Linear attention carries a state along the row: a convolution over the last few tokens, and the sum of the gated delta
rule (Yang et al., arXiv 2412.06464). In a packed row both must restart with each sample. The kernels of
flash-linear-attention and causal-conv1d take the boundaries as arguments; the torch functions of transformers do not.
Here the projections run over the whole row, and convolution and delta rule over each sample separately:

    in_proj_*   [1, T, ...]          one matrix product for the row
      split     [1, T_i, ...] each   convolution, delta rule: transformers' own functions
    norm, out_proj                   over the whole row again

This is exact and needs no padded copy of the row, but is slower than the kernels.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwenvl.models.attention.segments import Segments

PACKAGES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}
"""Modules with the kernels, and the packages that hold them."""


class SegmentedLinearAttention(nn.Module):
    """A linear attention layer of transformers that respects the boundaries of packed samples.

    It shares the stock layer's dictionaries of parameters and submodules, so that engines and adapters that replace
    entries in one layer replace them in both.

    Args:
        layer: Stock layer (``Qwen3_5GatedDeltaNet``), which still computes rows that are not packed.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._parameters, self._modules, self._buffers = layer._parameters, layer._modules, layer._buffers
        self._stock = (layer,)  # in a tuple, it is no submodule

    @property
    def _functions(self) -> Any:
        """Module of the stock layer's functions. Not an attribute: a copy of the model would have to copy it."""
        return sys.modules[type(self._stock[0]).__module__]

    def forward(self, hidden_states: Tensor, segments: Segments | None = None, **options: Any) -> Tensor:
        """Return [B, T, H].

        Args:
            hidden_states: [B, T, H]; B is 1 for a packed row.
            segments: Lengths of the packed samples; None outside training, such as in ``generate``.
            options: Other arguments of the stock layer; ``cu_seq_lens_q`` marks a packed row.
        """
        if segments is None or options.get("cu_seq_lens_q") is None:
            output: Tensor = self._stock[0].forward(hidden_states, **options)
            return output
        return self._each(hidden_states, segments.lengths)

    @torch.compiler.disable  # it would be compiled again for each number of samples
    def _each(self, hidden_states: Tensor, lengths: tuple[int, ...]) -> Tensor:
        layer = self._stock[0]
        decay = -layer.A_log.float().exp() * functional.softplus(layer.in_proj_a(hidden_states).float() + layer.dt_bias)
        whole = (layer.in_proj_qkv(hidden_states), layer.in_proj_b(hidden_states).sigmoid(), decay)
        parts = zip(*(tensor.split(lengths, dim=1) for tensor in whole), strict=True)
        mixed = torch.cat([self._one(*part) for part in parts], dim=1)
        gate = layer.in_proj_z(hidden_states).unflatten(-1, (-1, layer.head_v_dim))
        normed = layer.norm(mixed.flatten(0, 2), gate.flatten(0, 2)).view_as(mixed)
        output: Tensor = layer.out_proj(normed.flatten(2))
        return output

    def _one(self, projected: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        """Mix the tokens of one sample.

        Args:
            projected: [1, T_i, 2 x key width + value width], queries, keys and values before the convolution.
            beta: [1, T_i, value heads], write strength of the delta rule, 0 to 1.
            decay: [1, T_i, value heads], logarithm of the state's decay factor.

        Returns:
            [1, T_i, value heads, value head width].
        """
        layer = self._stock[0]
        convolved = self._functions.causal_conv1d_fn(
            projected.transpose(1, 2), layer.conv1d.weight.squeeze(1), layer.conv1d.bias, activation=layer.activation
        ).transpose(1, 2)
        query, key, value = convolved.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
        value = value.unflatten(-1, (-1, layer.head_v_dim))
        shared = layer.num_v_heads // layer.num_k_heads  # value heads of a key head; older functions want them repeated
        query, key = (
            tensor.unflatten(-1, (-1, layer.head_k_dim)).repeat_interleave(shared, dim=2) for tensor in (query, key)
        )
        mixed: Tensor = self._functions.torch_chunk_gated_delta_rule(
            query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True
        )[0]
        return mixed


def missing_kernels() -> str:
    """Return why the varlen kernels cannot run here; empty if they can."""
    obstacles = [obstacle for module in PACKAGES if (obstacle := import_obstacle(module))]
    if not obstacles and not torch.cuda.is_available():
        return "there is no CUDA device"
    return "; ".join(obstacles)


def import_obstacle(module: str) -> str:
    """Return why a module cannot be imported; empty if it can. A build for another torch fails on import."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({next(iter(str(error).splitlines()), type(error).__name__)})"
    return ""
