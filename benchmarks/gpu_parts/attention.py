"""Attention of a pack of many samples: sample by sample, by one varlen call of torch, and by flash-attention."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_parts.base import Part, Place, Row

_HEADS, _KEY_HEADS, _WIDTH = 32, 8, 128
"""Shapes of Qwen3-VL-8B."""
_CLOSE = 2e-2
"""Largest difference of two kernels in bfloat16, for outputs of about 1."""
Attention = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


def _loop(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = [tensor.transpose(0, 1)[None].split(lengths, 2) for tensor in (query, key, value)]
    attended = [
        functional.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        for one in zip(*parts, strict=True)
    ]
    return torch.cat(attended, 2)[0].transpose(0, 1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = _borders(lengths, query.device), max(lengths)
    causal = {"window_size": (-1, 0), "enable_gqa": True}
    found: Tensor = varlen_attn(query, key, value, borders, borders, longest, longest, **causal)
    return found


def _flash2(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    borders, longest = _borders(lengths, query.device), max(lengths)
    found: Tensor = flash_attn_varlen_func(query, key, value, borders, borders, longest, longest, causal=True)
    return found


def _flash3(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    borders, longest = _borders(lengths, query.device), max(lengths)
    found = flash_attn_varlen_func(query, key, value, borders, borders, longest, longest, causal=True)
    return found[0] if isinstance(found, tuple) else found


def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def compare(place: Place, item: str) -> Row:
    """Time forward and backward pass of each kind of attention, and compare their outputs."""
    samples, tokens = int(item.split()[0]), 256 if place.rehearsal else 8192
    length = tokens // samples
    lengths = (length,) * (samples - 1) + (tokens - length * (samples - 1),)
    torch.manual_seed(0)
    kind = torch.float32 if place.rehearsal else torch.bfloat16
    made = [torch.randn(tokens, heads, _WIDTH) for heads in (_HEADS, _KEY_HEADS, _KEY_HEADS)]
    inputs = [tensor.to(place.device, kind).requires_grad_() for tensor in made]
    kinds: dict[str, Attention] = {"loop": _loop}
    if not place.rehearsal:
        kinds["varlen"] = _varlen
        kinds |= {"flash2": _flash2} if find_spec("flash_attn") else {}
        kinds |= {"flash3": _flash3} if find_spec("flash_attn_interface") else {}
    outputs = {name: attention(*inputs, lengths).detach().float() for name, attention in kinds.items()}
    differences = {
        f"{name}_difference": float((output - outputs["loop"]).abs().max()) for name, output in outputs.items()
    }
    times = {f"{name}_ms": _milliseconds(place, attention, inputs, lengths) for name, attention in kinds.items()}
    return {**times, **differences, "passed": max(differences.values()) < _CLOSE}


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


PART = Part(("4 samples", "25 samples", "100 samples"), compare, rehearsed=("4 samples",))
