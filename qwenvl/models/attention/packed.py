"""Attention of the language model one sample at a time: exact for packed rows, without a mask of the whole row.

Under SDPA, stock transformers separates the samples of a row by a mask of [T, T], whose memory and time grow with the
square of the row's length. A sample on its own needs no mask, only ``is_causal``; the cost then grows with the square
of the sample's length. Padded rows need no mask either: padding is at the end, and causal attention never reaches it.

Flash attention and torch's varlen kernel (:mod:`qwenvl.models.attention.varlen`) do the same in one launch, by
``cu_seq_lens``; this module is for when neither can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from qwenvl.models.attention import varlen
from qwenvl.models.attention.probe import show
from qwenvl.models.attention.segments import Segments
from qwenvl.utils.errors import UserError

NAME = "sdpa_segments"
"""Name of the attention in transformers' registry. No mask function is registered under it, so that transformers makes
no mask."""


_LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention"}
_UNKNOWN_SWITCHES = (
    *("attn_logit_softcapping", "attention_chunk_size", "use_bidirectional_attention"),
    *("final_logit_softcapping", "logit_scale", "logits_scaling"),  # between hidden states and loss
)


@torch.compiler.disable  # it would be compiled again for each number of samples
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
        module: Attention layer.
        query: [B, heads, T, D].
        key: [B, key heads, T, D]; heads are a multiple of key heads.
        value: [B, key heads, T, D].
        attention_mask: Ignored.
        segments: Segments of the rows; their lengths add up to T.
        scaling: Factor of the products of queries and keys; default 1 / sqrt(D).
        dropout: Dropout probability of the attention weights.
        kwargs: Options of attention functions. ``sliding_window``: number of tokens that a token sees, including
            itself, None for no limit; ``attention_probe``: probe that receives queries and keys; others are ignored.

    Returns:
        ([B, T, heads, D], None).

    Raises:
        ValueError: ``segments`` is missing, as in calls outside training: samples would see each other, and tokens
            would see padding.
        UserError: The layer requests a feature that is not computed here, although its config has no switch for it.
    """
    del attention_mask
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks or caps its logits, which is not computed here. Use another "
            "language model."
        )
    if segments is None:
        raise ValueError(
            f"The attention {NAME!r} is for training and needs the lengths of the samples. Before other calls, such as "
            "generate, choose another one: model.set_attn_implementation('sdpa')."
        )
    show(module, query, key, {**kwargs, "segments": segments, "scaling": scaling})
    # norms of queries and keys return float32 under autocast with float32 weights; SDPA would cast each sample
    parts = (query.to(value.dtype), key.to(value.dtype), value)
    queries, keys, values = (tensor.split(segments.lengths, dim=2) for tensor in parts)
    grouped = query.shape[1] != key.shape[1]
    attended = [
        functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=grouped, **_visible(q, kwargs.get("sliding_window"))
        )
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    joined = torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]
    return joined.transpose(1, 2).contiguous(), None


def _visible(query: Tensor, sliding_window: int | None) -> dict[str, Any]:
    """Return SDPA's arguments for causal attention in a segment [..., T, D]; a mask only if it exceeds the window."""
    length = query.shape[-2]
    if sliding_window is None or length <= sliding_window:
        return {"is_causal": True}
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    return {"attn_mask": causal.triu_(1 - sliding_window)}


def refuse_unknown_switches(config: Any, *, shows_maps: bool = False) -> None:
    """Refuse a language model with features that the attention and the head of this trainer do not compute.

    Call it for models that attend by segments, which implement causal attention, with or without a sliding window.

    Args:
        config: Config of the checkpoint.
        shows_maps: Whether an attention probe is used, which does not support sliding windows.

    Raises:
        UserError: The config has a switch that would be ignored.
    """
    text = config.get_text_config()
    switches = {name: getattr(text, name, None) for name in _UNKNOWN_SWITCHES}
    types = set(getattr(text, "layer_types", None) or ())
    switches["layer_types"] = sorted(types - _LAYER_TYPES)
    if shows_maps and ("sliding_attention" in types or not types):
        switches["sliding_window"] = getattr(text, "sliding_window", None)
    found = [f"{name} {value}" for name, value in switches.items() if value and (value is True or value != 1.0)]
    if found:
        raise UserError(
            f"The config.json of the language model ({text.model_type}) has {', '.join(found)}, which training does "
            "not compute here. Use a language model without it."
        )


def attend_by_segments(
    model: PreTrainedModel, kernel: varlen.VarlenKernel | None = None, *, stock_tower: bool = True
) -> None:
    """Make a stock model attend to one sample, and in the tower to one image, without a mask.

    Args:
        model: Model loaded with SDPA; its config changes in memory only, as saved files do not name the attention.
        kernel: Kernel that does so in one call; None for a call of SDPA per sample, and the stock tower's own loop over
            images.
        stock_tower: Whether the vision tower is one of transformers, which can use the kernel too.
    """
    if kernel is None:
        AttentionInterface.register(NAME, segmented_attention)
        model.set_attn_implementation({"text_config": NAME})
        return
    AttentionInterface.register(varlen.NAME, partial(varlen.varlen_attention, kernel=kernel))
    tower = {"vision_config": varlen.NAME} if stock_tower else {}
    model.set_attn_implementation({"text_config": varlen.NAME, **tower})


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch a model from an attention of training to SDPA, which ``generate`` needs."""
    config: Any = model.config
    names = {part: getattr(config, part)._attn_implementation for part in config.sub_configs}
    ours = {part: "sdpa" for part, name in names.items() if name in (NAME, varlen.NAME)}
    if ours:
        model.set_attn_implementation(ours)
    try:
        yield
    finally:
        if ours:
            model.set_attn_implementation({part: names[part] for part in ours})
