"""Attention of a pack of many samples: sample by sample, by one varlen call of torch, and by flash-attention."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_parts.base import Part, Place, Row
from qwenvl.models.attention.varlen import torch_kernel

_CLOSE = 2e-2
"""Largest difference of outputs and of gradients of two kernels in bfloat16, over their norm."""
Attention = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class _Shape:
    """Heads, key heads, width of a head, and whether it is causal."""

    heads: int
    key_heads: int
    width: int
    causal: bool


_SHAPES = {"samples": _Shape(32, 8, 128, causal=True), "images": _Shape(16, 16, 72, causal=False)}
"""Language model and tower of Qwen3-VL-8B."""


def _loop(shape: _Shape, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = [tensor.transpose(0, 1)[None].split(lengths, 2) for tensor in (query, key, value)]
    grouped = shape.heads != shape.key_heads
    attended = [
        functional.scaled_dot_product_attention(*one, is_causal=shape.causal, enable_gqa=grouped)
        for one in zip(*parts, strict=True)
    ]
    return torch.cat(attended, 2)[0].transpose(0, 1)


def _varlen(shape: _Shape, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    kernel = torch_kernel()
    assert kernel is not None
    borders, longest = _borders(lengths, query.device), max(lengths)
    window, grouped = (-1, 0 if shape.causal else -1), shape.heads != shape.key_heads
    options: Any = {"scale": None, "window_size": window, "enable_gqa": grouped}
    return kernel(query, key, value, borders, borders, longest, longest, **options)


def _flash2(shape: _Shape, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    borders, longest = _borders(lengths, query.device), max(lengths)
    options = {"causal": shape.causal}
    found: Tensor = flash_attn_varlen_func(query, key, value, borders, borders, longest, longest, **options)
    return found


def _flash3(shape: _Shape, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    borders, longest = _borders(lengths, query.device), max(lengths)
    options = {"causal": shape.causal}
    found = flash_attn_varlen_func(query, key, value, borders, borders, longest, longest, **options)
    return found[0] if isinstance(found, tuple) else found


def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def compare(place: Place, item: str) -> Row:
    """Time forward and backward pass of each kind of attention, and compare outputs and gradients with the loop's."""
    count, what = item.split()
    samples, tokens, shape = int(count), 256 if place.rehearsal else 8192, _SHAPES[what]
    length = tokens // samples
    lengths = (length,) * (samples - 1) + (tokens - length * (samples - 1),)
    torch.manual_seed(0)
    kind = torch.float32 if place.rehearsal else torch.bfloat16
    made = [torch.randn(tokens, heads, shape.width) for heads in (shape.heads, shape.key_heads, shape.key_heads)]
    inputs = [tensor.to(place.device, kind).requires_grad_() for tensor in made]
    kinds = {name: partial(attention, shape) for name, attention in _kinds(place).items()}
    weights = torch.randn(tokens, shape.heads, shape.width).to(place.device, kind)
    results = {name: _results(attention, inputs, weights, lengths) for name, attention in kinds.items()}
    differences = {
        f"{name}_difference": max(
            float((one - other).norm() / other.norm()) for one, other in zip(found, results["loop"], strict=True)
        )
        for name, found in results.items()
    }
    times = {f"{name}_ms": _milliseconds(place, attention, inputs, lengths) for name, attention in kinds.items()}
    return {**times, **differences, "passed": max(differences.values()) < _CLOSE}


def _kinds(place: Place) -> dict[str, Callable[..., Tensor]]:
    """Return the kinds of attention that can run."""
    kinds: dict[str, Callable[..., Tensor]] = {"loop": _loop}
    if place.rehearsal:
        return kinds
    kinds |= {"varlen": _varlen} if torch_kernel() is not None else {}
    kinds |= {"flash2": _flash2} if find_spec("flash_attn") else {}
    return kinds | ({"flash3": _flash3} if find_spec("flash_attn_interface") else {})


def _results(attention: Attention, inputs: list[Tensor], weights: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Return output and gradients, in float32."""
    output = attention(inputs[0], inputs[1], inputs[2], lengths)
    gradients = torch.autograd.grad((output * weights).float().sum(), inputs)
    return [tensor.detach().float() for tensor in (output, *gradients)]


def _milliseconds(place: Place, attention: Attention, inputs: list[Tensor], lengths: tuple[int, ...]) -> float:
    """Return the median of some forward and backward passes."""
    seconds = []
    for _ in range(3 if place.rehearsal else 20):
        _wait(place)
        started = time.perf_counter()
        attention(inputs[0], inputs[1], inputs[2], lengths).float().sum().backward()
        _wait(place)
        seconds.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(seconds[1:]), 3)


def _wait(place: Place) -> None:
    if not place.rehearsal:
        torch.cuda.synchronize()


PART = Part(("4 samples", "25 samples", "100 samples", "64 images"), compare, rehearsed=("4 samples", "64 images"))
