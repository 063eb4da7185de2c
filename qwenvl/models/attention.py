"""Attention of the language model one sample at a time: exact for packed rows, without a mask of the whole row.

Stock transformers keeps the samples of a row apart under SDPA by a mask of [T, T], whose memory and time grow with the
square of the row. Each sample on its own needs no mask, only "causal": its cost grows with the square of the sample.
Padded rows need none either, because padding stands at the end, where no token looks.

Flash attention does the same in its kernel, by ``cu_seq_lens``; this is for where it is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from qwenvl.models.attention_maps import show
from qwenvl.models.segments import Segments

NAME = "sdpa_segments"
"""Under which transformers knows it. It has no function that makes masks: that is how transformers learns that none is
wanted."""


@torch.compiler.disable  # compiled, it would be compiled anew for each number of samples
def segmented_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment of the rows, causally; an attention function of transformers.

    Args:
        module: the attention layer.
        query: [B, heads, T, D].
        key: [B, key heads, T, D]; query heads are a multiple of its heads.
        value: like ``key``.
        attention_mask: not used.
        segments: whose lengths add up to T.
        scaling: of the products; default 1 / sqrt(D).
        dropout: of the attention weights.
        kwargs: ``attention_probe``, which is shown the queries and keys; the rest is of other attention functions.

    Returns:
        ([B, T, heads, D], None).

    Raises:
        ValueError: ``segments`` is missing, as in a call that is not the trainer's: without it, samples would
            see each other, and tokens would see padding.
    """
    del attention_mask
    if segments is None:
        raise ValueError(
            f"The attention {NAME!r} is for training and has to be told where samples end. Before other calls, such as "
            "generate, choose another one: model.set_attn_implementation('sdpa')."
        )
    show(module, query, key, {**kwargs, "segments": segments, "scaling": scaling})
    queries, keys, values = (tensor.split(segments.lengths, dim=2) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    attended = [
        functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    joined = torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]
    return joined.transpose(1, 2).contiguous(), None


def attend_by_segments(model: PreTrainedModel) -> None:
    """Let the language model of a stock model attend one sample at a time; the vision tower stays as it is.

    Args:
        model: loaded with SDPA. Its config says so in memory alone: saved files do not hold the attention.
    """
    AttentionInterface.register(NAME, segmented_attention)
    model.set_attn_implementation({"text_config": NAME})
