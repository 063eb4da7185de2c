"""The MTP layer of a sample in plain torch, from what vLLM computes, and the loss from single samples.

Sources: ``Qwen3_5MultiTokenPredictor.forward`` (``qwen3_5_mtp.py``), ``Qwen3NextAttention.forward`` and
``Qwen3NextSparseMoeBlock.forward`` (``qwen3_next.py``), ``apply_interleaved_rope`` (``mrope.py``), and
``SpecDecodeBaseProposer.set_inputs_first_pass``: tokens are shifted by one, positions and hidden states are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred RMSNorm."""
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def rotate(heads: Tensor, positions: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Rotate the first dimensions of heads [T, n, D] by interleaved M-RoPE positions [3, T]: T H W T H W ... T T."""
    width = int(heads.shape[-1] * rope["partial_rotary_factor"])
    frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    axis = [
        next((side for side in (1, 2) if pair % 3 == side and pair < 3 * rope["mrope_section"][side]), 0)
        for pair in range(width // 2)
    ]
    angles = (positions[axis].T * frequencies)[:, None]  # [T, 1, width / 2]
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second, rest = heads.split([width // 2, width // 2, heads.shape[-1] - width], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention(states: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: Any) -> Tensor:
    """Gated causal attention with norms of queries and keys, [T, H]."""
    queries, keys, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query, gate = (states @ weights["q_proj"].T).view(-1, queries, 2 * width).split(width, dim=-1)
    key, value = ((states @ weights[name].T).view(-1, keys, width) for name in ("k_proj", "v_proj"))
    query = rotate(norm(query, weights["q_norm"], config.rms_norm_eps), positions, config.rope_parameters)
    key = rotate(norm(key, weights["k_norm"], config.rms_norm_eps), positions, config.rope_parameters)
    key, value = (part.repeat_interleave(queries // keys, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / width**0.5
    seen = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)
    attended = torch.einsum("hqk,khd->qhd", seen, value) * gate.sigmoid()
    return attended.flatten(1) @ weights["o_proj"].T


def feed_forward(states: Tensor, weights: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """Gated feed-forward, [T, H]."""
    gate, up = (states @ weights[f"{prefix}{name}"].T for name in ("gate_proj", "up_proj"))
    return (functional.silu(gate) * up) @ weights[f"{prefix}down_proj"].T


def experts(states: Tensor, weights: Mapping[str, Tensor], config: Any) -> Tensor:
    """Mixture of experts with a gated shared one: chosen ones are weighted by their renormalised probabilities."""
    chances = (states @ weights["gate"].T).softmax(-1)
    best, chosen = chances.topk(config.num_experts_per_tok, dim=-1)
    shares = torch.zeros_like(chances).scatter(1, chosen, best / best.sum(-1, keepdim=True))
    each = torch.stack(
        [
            (functional.silu(gate) * up) @ down.T
            for joined, down in zip(weights["experts.gate_up_proj"], weights["experts.down_proj"], strict=True)
            for gate, up in [(states @ joined.T).chunk(2, dim=-1)]
        ]
    )
    shared = feed_forward(states, weights, "shared_expert.") * (states @ weights["shared_expert_gate"].T).sigmoid()
    return torch.einsum("te,eth->th", shares, each) + shared


def drafts(embeddings: Tensor, hidden: Tensor, positions: Tensor, mtp: Mapping[str, Tensor], config: Any) -> Tensor:
    """Return hidden states [T - 1, H] that give tokens 2, 3, ... of a sample.

    Args:
        embeddings: [T, H], what the language model gets: embeddings of tokens, and visual features.
        hidden: [T, H], after the language model's last norm.
        positions: int64 [3, T], M-RoPE positions.
        mtp: the tensors ``mtp.*``, by published names without that prefix and ``.weight``, experts stacked.
        config: of the language model.
    """
    eps = config.rms_norm_eps
    layer = {name.removeprefix("layers.0."): value for name, value in mtp.items() if name.startswith("layers.0.")}
    attended, mixed = (
        {name.removeprefix(f"{part}."): value for name, value in layer.items() if name.startswith(f"{part}.")}
        for part in ("self_attn", "mlp")
    )
    following = norm(embeddings[1:], mtp["pre_fc_norm_embedding"], eps)
    states = torch.cat([following, norm(hidden[:-1], mtp["pre_fc_norm_hidden"], eps)], dim=-1) @ mtp["fc"].T
    states = states + attention(norm(states, layer["input_layernorm"], eps), positions[:, :-1], attended, config)
    normed = norm(states, layer["post_attention_layernorm"], eps)
    states = states + (experts(normed, mixed, config) if "gate" in mixed else feed_forward(normed, mixed))
    return norm(states, mtp["norm"], eps)


def trunk(model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return what a stock model's language model gets and gives for one sample: both [T, H]."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
    handle.remove()
    return seen[0], hidden


def summed_loss(model: Any, sample: Any, weights: Tensor | None = None) -> Tensor:
    """Return the MTP layer's cross entropy, summed over the trained tokens of a sample from its third token on.

    Args:
        model: stock model with the layer at ``mtp``.
        sample: ``inputs`` of the stock model, ``labels`` int64 [1, T], ``position_ids`` int64 [4, 1, T].
        weights: float32 [T], of the tokens; None if all are 1.
    """
    embeddings, hidden = trunk(model, sample.inputs)
    mtp = {name.removesuffix(".weight"): value for name, value in model.mtp.named_parameters()}
    states = drafts(embeddings, hidden, sample.position_ids[1:, 0], mtp, model.config.get_text_config())
    logits = states[:-1] @ model.lm_head.weight.T
    labels = sample.labels[0, 2:]
    losses = functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return losses.sum() if weights is None else losses @ weights[2:]
