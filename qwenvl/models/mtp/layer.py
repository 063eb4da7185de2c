"""The layer for multi-token prediction (MTP) of Qwen3.5 and newer checkpoints, which transformers does not build.

It predicts the token after the next, and a server uses it as the draft model of speculative decoding. From the hidden
state of position t, after the language model's last norm, and the embedding of token t + 1 it computes the hidden state
that gives token t + 2 through the model's own ``lm_head``:

    x[t] = fc([norm(embedding(token[t + 1])), norm(hidden[t])])      mtp.pre_fc_norm_embedding, mtp.pre_fc_norm_hidden
    h[t] = norm(decoder layer with full attention(x)[t])             mtp.layers.0, mtp.norm

Position t keeps its own (M-RoPE) position, although its input is the next token. If token t + 1 is visual, its
embedding is the visual feature. The names are those of the published files; the computation is that of vLLM's
``qwen3_5_mtp.py`` (in ``vllm/model_executor/models``) and of its proposer (``v1/spec_decode/llm_base_proposer.py``).
The idea is DeepSeek-V3's (arXiv 2412.19437, section 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MTP = "mtp"
"""Attribute of a model that trains the layer, and prefix of the layer's tensors in a checkpoint's files."""


class MultiTokenPrediction(nn.Module):
    """The MTP layer, built from the classes of its language model.

    Args:
        language_model: Stock language model with gated full attention; its own parameters are not touched. The layer
            shares its config, so that both have the same attention implementation.
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        config = language_model.config
        norm, layer = type(language_model.norm), type(language_model.layers[0])
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = norm(width, eps=eps)
        self.pre_fc_norm_hidden = norm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([layer(config, full_attention(language_model))])
        self.norm = norm(width, eps=eps)

    def forward(self, embeddings: Tensor, hidden_states: Tensor, **options: Any) -> Tensor:
        """Return hidden states [B, T, H] that give the token after the next.

        Args:
            embeddings: [B, T, H], at each position the embedding of the next token.
            hidden_states: [B, T, H], after the language model's last norm.
            options: Keyword arguments of a decoder layer: ``position_embeddings``, ``attention_mask`` and the like.
        """
        joined = torch.cat([self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden_states)], dim=-1)
        states: Tensor = self.layers[0](self.fc(joined), **options)
        normed: Tensor = self.norm(states)
        return normed


def full_attention(language_model: Any) -> int:
    """Return the index of a language model's first layer with full attention."""
    index: int = language_model.config.layer_types.index("full_attention")
    return index


def mtp_of(model: Any) -> MultiTokenPrediction | None:
    """Return the MTP layer of a model that trains it; None for a model without one, as transformers builds it."""
    found: MultiTokenPrediction | None = getattr(model, MTP, None)
    return found


def is_mtp(name: str) -> bool:
    """Whether a parameter or tensor of this name belongs to the MTP layer."""
    return name.startswith(f"{MTP}.")
