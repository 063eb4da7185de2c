"""A varlen kernel for the CPU, to be passed in the place of torch's, which runs on CUDA alone."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional


class ReferenceKernel:
    """Attention of one sample after another by an explicit mask; it counts its calls and checks what it is given.

    Attributes:
        calls: Number of calls by (window, dtype of the queries).
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[tuple[int, int], torch.dtype]] = Counter()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        """See :class:`qwenvl.models.attention.varlen.VarlenKernel`."""
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        lengths = cu_seq_q.diff().tolist()
        assert type(max_q) is int and max_q == max_k == max(lengths) and sum(lengths) == len(query)
        assert query.dtype == key.dtype == value.dtype and query.stride(-1) == 1
        assert enable_gqa == (query.shape[1] != key.shape[1])
        self.calls[window_size, query.dtype] += 1
        parts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        attended = [
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=_visible(q.shape[1], window_size), scale=scale, enable_gqa=enable_gqa
            )
            for q, k, v in parts
        ]
        return torch.cat(attended, dim=1).transpose(0, 1)


def _visible(length: int, window_size: tuple[int, int]) -> Tensor:
    before, after = (length if size < 0 else size for size in window_size)
    ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
    return (ahead >= -before) & (ahead <= after)
