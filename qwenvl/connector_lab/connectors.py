"""Connectors: modules that turn features of the vision encoder into tokens for the language model.

All take ``(features, sizes)``: features [patches of all images, encoder width], image after image, each row by row
(``merger``: in blocks of 2x2 patches), and (height, width) of each image in patches; and return [tokens of all images,
width of the language model]. A connector handles each image independently of the others in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qwenvl.connector_lab.config import MERGE_SIZE, LabVisionConfig
from qwenvl.utils.errors import UserError

Sizes = Sequence[tuple[int, int]]
"""(height, width) of each image, in patches."""

_BASE = 10_000.0
"""Base of the wavelengths of sine positions."""


class MeanPool(nn.Module):
    """One token per image: the projected mean of its patches. A baseline for the other connectors.

    Args:
        width: Width of the encoder.
        out: Width of the language model.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out)

    def forward(self, features: Tensor, sizes: Sizes) -> Tensor:
        """Return [images, out]."""
        return self.proj(torch.stack([one.mean(0) for one in _split(features, sizes)]))


class Projector(nn.Module):
    """LLaVA's projector: two layers with a GELU between, applied to each patch.

    LLaVA-1.5 (Liu et al., 2023, arXiv 2310.03744, section 3.2); ``LlavaMultiModalProjector`` of transformers.

    Args:
        width: Width of the encoder.
        out: Width of the language model.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(out, out)

    def forward(self, features: Tensor, sizes: Sizes) -> Tensor:
        """Return [patches, out]."""
        del sizes
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected


class PatchMerger(nn.Module):
    """Qwen2-VL's merger: two layers on the concatenated features of 2x2 neighbouring patches.

    Wang et al., 2024, arXiv 2409.12191, section 2.1; ``PatchMerger`` of transformers' Qwen2-VL.

    Args:
        width: Width of the encoder.
        out: Width of the language model.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        merged = width * MERGE_SIZE**2
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out))

    def forward(self, features: Tensor, sizes: Sizes) -> Tensor:
        """Return [patches / 4, out]."""
        del sizes
        merged: Tensor = self.mlp(self.ln_q(features).reshape(-1, features.shape[-1] * MERGE_SIZE**2))
        return merged


class QueryFormer(nn.Module):
    """BLIP-2's Q-Former without text input: queries attend to each other and, in every other layer, to patches.

    Li et al., 2023, arXiv 2301.12597, section 3.1; the layers are ``Blip2QFormerModel`` of transformers, without
    dropout.

    Args:
        config: Config of encoder and connector.
    """

    def __init__(self, config: LabVisionConfig) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        width = config.connector_hidden_size
        _require_heads(width, config.connector_heads)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, width).normal_(0, 0.02))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=config.connector_layers,
                num_attention_heads=config.connector_heads,
                intermediate_size=4 * width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=config.initializer_range,
                encoder_hidden_size=config.encoder_width,
            )
        )
        self.language_projection = nn.Linear(width, config.out_hidden_size)

    def forward(self, features: Tensor, sizes: Sizes) -> Tensor:
        """Return [images x queries, out]."""
        padded, mask = _pad(features, sizes)
        queries = self.query_tokens.expand(len(padded), -1, -1)
        seen = self.qformer(query_embeds=queries, encoder_hidden_states=padded, encoder_attention_mask=mask.long())
        tokens: Tensor = self.language_projection(seen.last_hidden_state.to(self.language_projection.weight.dtype))
        return tokens.flatten(0, 1)


class Resampler(nn.Module):
    """Qwen-VL's position-aware adapter: one layer of cross attention from learned queries on a square grid.

    Bai et al., 2023, arXiv 2308.12966, section 2.1, and ``Resampler`` and ``VisionTransformer`` of
    ``visual.py`` in the Qwen-VL checkpoint. Queries and keys get 2-D sine positions; values get none. For images of
    other sizes Qwen-VL interpolates its table of positions; here the sines are computed at the positions of the
    patches, which is equal where there are as many patches as queries.

    Args:
        width: Width of the encoder.
        out: Width of the language model.
        num_queries: Tokens per image, a square number.
        heads: Attention heads.
    """

    def __init__(self, width: int, out: int, num_queries: int, heads: int) -> None:
        super().__init__()
        self.side = math.isqrt(num_queries)
        if self.side**2 != num_queries:
            raise UserError(
                f"num_queries {num_queries}: a resampler needs a square number of queries, such as 64 or 256."
            )
        if out % 4:
            raise UserError(f"A resampler needs a language model whose width is a multiple of 4, not {out}.")
        _require_heads(out, heads)
        self.query = nn.Parameter(torch.empty(num_queries, out).normal_(0, 0.02))
        self.kv_proj = nn.Linear(width, out, bias=False)
        self.ln_q = nn.LayerNorm(out, eps=1e-6)
        self.ln_kv = nn.LayerNorm(out, eps=1e-6)
        self.attn = nn.MultiheadAttention(out, heads, batch_first=True)
        self.ln_post = nn.LayerNorm(out, eps=1e-6)
        self.proj = nn.Linear(out, out, bias=False)

    def forward(self, features: Tensor, sizes: Sizes) -> Tensor:
        """Return [images x queries, out]."""
        values = self.ln_kv(self.kv_proj(features))
        places = torch.cat([grid_positions(size, self.side, values.shape[-1], values.device) for size in sizes])
        keys, mask = _pad(values + places.to(values.dtype), sizes)
        padded_values, _ = _pad(values, sizes)
        own = grid_positions((self.side, self.side), self.side, values.shape[-1], values.device).to(values.dtype)
        queries = (self.ln_q(self.query) + own).expand(len(keys), -1, -1)
        seen, _ = self.attn(queries, keys, padded_values, key_padding_mask=~mask, need_weights=False)
        tokens: Tensor = self.proj(self.ln_post(seen))
        return tokens.flatten(0, 1)


def grid_positions(size: tuple[int, int], side: int, width: int, device: torch.device) -> Tensor:
    """Return 2-D sine positions of patches, in units of a grid of ``side`` x ``side`` over the whole image.

    The first half of the channels holds sines and cosines of the column, the second half of the row, as in
    ``get_2d_sincos_pos_embed`` of MAE, which Qwen-VL uses.

    Args:
        size: (height, width) of the image in patches.
        side: Queries per side of their grid.
        width: Width of an embedding.
        device: Device of the result.

    Returns:
        float32 [height x width, ``width``], row by row.
    """
    rows, columns = ((torch.arange(n, device=device, dtype=torch.float32) + 0.5) * side / n - 0.5 for n in size)
    across = sine_positions(columns, width // 2).expand(size[0], -1, -1)
    down = sine_positions(rows, width // 2)[:, None].expand(-1, size[1], -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def sine_positions(places: Tensor, width: int) -> Tensor:
    """Return sines, then cosines, of positions at wavelengths from 2 pi to 2 pi x 10,000: float32 [n, ``width``]."""
    half = width // 2
    rates = _BASE ** (-torch.arange(half, device=places.device, dtype=torch.float32) / half)
    angles = places[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def build_connector(config: LabVisionConfig) -> nn.Module:
    """Return the connector that a config names, with random weights.

    Raises:
        UserError: the name is unknown, or the sizes do not fit each other.
    """
    width, out = config.encoder_width, config.out_hidden_size
    if config.connector == "qformer":
        return QueryFormer(config)
    if config.connector == "resampler":
        return Resampler(width, out, config.num_queries, config.connector_heads)
    plain = {"mlp": Projector, "merger": PatchMerger, "mean_pool": MeanPool}
    if config.connector not in plain:
        raise UserError(f"connector {config.connector!r} is not one of qformer, resampler, {', '.join(plain)}.")
    return plain[config.connector](width, out)


def _require_heads(width: int, heads: int) -> None:
    if width % heads:
        raise UserError(f"connector_heads {heads} does not divide the connector's width, {width}.")


def _split(features: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    return features.split([height * width for height, width in sizes])


def _pad(features: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return features padded to [images, max patches, width], and their mask: bool [images, max patches]."""
    images = _split(features, sizes)
    counts = torch.tensor([len(one) for one in images], device=features.device)
    padded = pad_sequence(list(images), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=features.device) < counts[:, None]
