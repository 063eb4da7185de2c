"""Attention maps: the attention weights from chosen text tokens to each token of an image.

``output_attentions=True`` keeps [heads, T, T] of every layer, and needs the slow eager attention. Here the rows of a
few tokens are enough. The attention function that training registers with transformers
(:func:`qwenvl.models.attention.packed.segmented_attention`) gets every layer's final queries and keys: after biases,
norms and rotary positions, in every family. It passes them to a probe:

    probe = AttentionProbe([Look(row=0, tokens=(40, 41), image_start=4, grid=(3, 5))])
    model.model(..., segments=segments, attention_probe=probe)
    probe.maps()  # one [layers x heads, 3, 5]

Linear attention layers do not call an attention function and give no map. In Qwen3.5 only the full-attention layers, a
quarter of all, give maps.

F-LMM predicts segmentation masks from such maps, for every layer and head, over the patches of the resized image (Wu et
al., "F-LMM: Grounding Frozen Large Multimodal Models", arXiv 2406.05821, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Number of products of queries and keys in memory at a time: 64 MB in float32."""

Merge = Literal["mean", "max"]


@dataclass(frozen=True, slots=True)
class Look:
    """Some tokens of a sample, and an image that precedes them in the same sample.

    Args:
        row: Row of the batch.
        tokens: Positions of the tokens, counted from the start of the row, also in a packed row.
        image_start: Position of the image's first token in the row.
        grid: (height, width) of the image in tokens, that is in merged patches, which are in row-major order.
    """

    row: int
    tokens: tuple[int, ...]
    image_start: int
    grid: tuple[int, int]

    @property
    def image_stop(self) -> int:
        """Position after the image's last token."""
        return self.image_start + self.grid[0] * self.grid[1]


@dataclass
class AttentionProbe:
    """Collects the requested attention maps while a model runs.

    Args:
        looks: Tokens and images to collect maps of.
        merge: Reduction over the tokens of one look: ``mean`` or element-wise ``max``.
        chunk_elements: Number of products of queries and keys in memory at a time. It bounds the memory for long
            phrases; one row per head, as long as the sample, is the least.
    """

    looks: Sequence[Look]
    merge: Merge = "mean"
    chunk_elements: int = CHUNK_ELEMENTS
    found: dict[int, list[Tensor]] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def see(self, layer: int, query: Tensor, key: Tensor, lengths: Sequence[int], scaling: float | None) -> None:
        """Collect the maps of one layer.

        Args:
            layer: Index of the layer.
            query: [B, heads, T, D].
            key: [B, key heads, T, D]; heads are a multiple of key heads.
            lengths: Lengths of the rows' segments; a token sees its own segment, up to itself.
            scaling: Factor of the products of queries and keys; default 1 / sqrt(D).

        Raises:
            ValueError: An image does not precede its tokens in the same segment.
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.found[layer] = [self._one(look, query[look.row], key[look.row], lengths, scale) for look in self.looks]

    def maps(self) -> list[Tensor]:
        """Return the map of each look: float32 [layers x heads, height, width], weights 0 to 1, layer by layer."""
        layers = [self.found[number] for number in sorted(self.found)]
        return [
            torch.cat([layer[place] for layer in layers]).unflatten(1, look.grid)
            for place, look in enumerate(self.looks)
        ]

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (rows, positions) of the tokens of all looks, one after another, int64."""
        rows = [look.row for look in self.looks for _ in look.tokens]
        tokens = [token for look in self.looks for token in look.tokens]
        return torch.tensor(rows, device=device, dtype=torch.int64), torch.tensor(tokens, device=device).long()

    def _one(self, look: Look, query: Tensor, key: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        """Return the map of one look in one layer: float32 [heads, height x width]."""
        start = _segment_start(look, lengths)
        keys = key[:, start : max(look.tokens) + 1]
        tokens = torch.tensor(look.tokens, device=query.device)
        image = slice(look.image_start - start, look.image_stop - start)
        chunk = max(1, self.chunk_elements // (query.shape[0] * keys.shape[1]))
        merged: Tensor | None = None
        for part in tokens.split(chunk):
            seen = _weights(query[:, part], keys, part - start, scale)[..., image]
            seen = seen.sum(1) if self.merge == "mean" else seen.amax(1)
            if merged is not None:
                seen = merged + seen if self.merge == "mean" else torch.maximum(merged, seen)
            merged = seen
        assert merged is not None, "a look has a token"
        return merged / len(look.tokens) if self.merge == "mean" else merged


def show(layer: Any, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> None:
    """Pass a layer's queries and keys to the probe, if the attention function was called with one.

    Args:
        layer: Attention layer.
        query: [B, heads, T, D].
        key: [B, key heads, T, D].
        options: Keyword arguments of the attention function: ``attention_probe``, ``segments`` and ``scaling``.
    """
    probe: AttentionProbe | None = options.get("attention_probe")
    if probe is not None:
        probe.see(layer.layer_idx, query, key, options["segments"].lengths, options.get("scaling"))


def _segment_start(look: Look, lengths: Sequence[int]) -> int:
    """Return the start of the segment that holds the tokens and the image of a look."""
    start = 0
    for length in lengths:
        if look.image_start < start + length:
            break
        start += length
    else:
        length = 0
    if not (start <= look.image_start and look.image_stop <= min(look.tokens) and max(look.tokens) < start + length):
        raise ValueError(f"{look}: the image must precede the tokens in the same segment; segments: {lengths}.")
    return start


def _weights(query: Tensor, keys: Tensor, last: Tensor, scale: float) -> Tensor:
    """Return the attention weights of some queries, each over the keys up to its own position.

    Args:
        query: [heads, n, D].
        keys: [key heads, S, D]; query head i is compared with key head i // (heads / key heads).
        last: int64 [n], index of the last key that each query sees.
        scale: Factor of the products of queries and keys.

    Returns:
        float32 [heads, n, S].
    """
    grouped = query.unflatten(0, (keys.shape[0], -1))
    products = (grouped @ keys.transpose(-1, -2).unsqueeze(1)).flatten(0, 1).float() * scale
    hidden = torch.arange(keys.shape[1], device=keys.device) > last[:, None]
    return products.masked_fill(hidden, -torch.inf).softmax(-1)
