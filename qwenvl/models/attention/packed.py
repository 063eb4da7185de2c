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

from qwenvl.models.attention.probe import show
from qwenvl.models.attention.segments import Segments
from qwenvl.utils.errors import UserError

NAME = "sdpa_segments"
"""Under which transformers knows it. It has no function that makes masks: that is how transformers learns that none is
wanted."""


_LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention"}
_UNKNOWN_SWITCHES = (
    *("attn_logit_softcapping", "attention_chunk_size", "use_bidirectional_attention"),
    *("final_logit_softcapping", "logit_scale", "logits_scaling"),  # between hidden states and loss
)


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
        kwargs: ``sliding_window``, the tokens that a token sees, itself included, None for all before it;
            ``attention_probe``, which is shown the queries and keys; the rest is of other attention functions.

    Returns:
        ([B, T, heads, D], None).

    Raises:
        ValueError: ``segments`` is missing, as in a call that is not the trainer's: without it, samples would
            see each other, and tokens would see padding.
        UserError: The layer asks for what is not computed here, and no switch of its config said so.
    """
    del attention_mask
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks or caps its logits, which is not computed here. Use another "
            "language model."
        )
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
            q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=grouped, **_visible(q, kwargs.get("sliding_window"))
        )
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    joined = torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]
    return joined.transpose(1, 2).contiguous(), None


def _visible(query: Tensor, sliding_window: int | None) -> dict[str, Any]:
    """Return how to say which tokens of a segment [..., T, D] see which: by a mask only where the window is shorter."""
    length = query.shape[-2]
    if sliding_window is None or length <= sliding_window:
        return {"is_causal": True}
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    return {"attn_mask": causal.triu_(1 - sliding_window)}


def refuse_unknown_switches(config: Any, *, shows_maps: bool = False) -> None:
    """Refuse a language model that is computed otherwise than the attention and the head here compute it.

    Call it where the model attends by segments: they know causal attention, also within a sliding window.

    Args:
        config: Config of the checkpoint.
        shows_maps: Whether a probe is to be shown the attention; it knows no windows.

    Raises:
        UserError: The config has a switch that would be passed over.
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


def attend_by_segments(model: PreTrainedModel) -> None:
    """Let the language model of a stock model attend one sample at a time; the vision tower stays as it is.

    Args:
        model: loaded with SDPA. Its config says so in memory alone: saved files do not hold the attention.
    """
    AttentionInterface.register(NAME, segmented_attention)
    model.set_attn_implementation({"text_config": NAME})
