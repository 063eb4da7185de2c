"""Load-balancing loss of mixtures of experts, computed per sample.

Switch Transformer (Fedus et al., 2021, arXiv 2101.03961, equations 4 to 6): with E experts, f_e the share of tokens
sent to expert e and p_e its mean probability, the loss is E x sum over e of f_e p_e. transformers computes it over all
tokens of a micro-batch, of all layers together. As the loss is not linear in the tokens, it would change with packing,
accumulation and the number of ranks. Here it is computed for each sample, and samples are weighted by their tokens. For
a single sample it equals transformers' loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwenvl.models.attention.segments import sample_index


def sample_of_tokens(batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Number the tokens of a batch by their sample.

    Args:
        batch: Batch of the collator, flattened with ``cu_seq_lens_q`` or padded with ``attention_mask``.

    Returns:
        (int64 [B x T], number of samples n): 0 to n - 1, and n for padding.
    """
    rows, length = batch["input_ids"].shape
    borders: Tensor | None = batch.get("cu_seq_lens_q")
    if borders is not None:
        return sample_index(borders, length).flatten().long(), len(borders) - 1
    numbers = torch.arange(rows, device=batch["input_ids"].device)[:, None].expand(rows, length)
    return torch.where(batch["attention_mask"].bool(), numbers, rows).flatten(), rows


def summed_balance(router_logits: Sequence[Tensor], top_k: int, samples: Tensor, count: int) -> Tensor:
    """Return the auxiliary loss of each sample times its tokens, summed over samples.

    Args:
        router_logits: [tokens, experts] of each layer with a router.
        top_k: Number of experts per token.
        samples: int64 [tokens], sample of each token, from :func:`sample_of_tokens`.
        count: Number of samples.

    Returns:
        float32 scalar; its gradient reaches the routers through the probabilities.
    """
    experts = router_logits[0].shape[-1]
    sent = torch.zeros(count + 1, experts, device=samples.device)
    likely = torch.zeros_like(sent)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.detach().topk(top_k, dim=-1).indices
        sent = sent.index_add(0, samples, torch.zeros_like(probabilities).scatter(1, chosen, 1.0))
        likely = likely.index_add(0, samples, probabilities)
    tokens = torch.zeros(count + 1, device=samples.device).index_add(0, samples, torch.ones_like(samples).float())
    seen = (tokens * len(router_logits)).clamp(min=1).unsqueeze(1)
    per_sample = experts * ((sent / seen) * (likely / seen)).sum(1)
    return (per_sample * tokens)[:count].sum()
