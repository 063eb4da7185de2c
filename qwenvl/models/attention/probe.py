"""How strongly tokens of a text look at each token of an image: the attention of chosen rows alone.

``output_attentions=True`` keeps [heads, T, T] of every layer, and takes the slow attention to make it. Here the rows of
a few tokens are enough. The attention function that training registers with transformers
(:func:`qwenvl.models.attention.packed.segmented_attention`) is handed every layer's queries and keys as they are
compared: after biases, norms and rotary positions, whatever the family has. It shows them to a probe on the way:

    probe = AttentionProbe([Look(row=0, tokens=(40, 41), image_start=4, grid=(3, 5))])
    model.model(..., segments=segments, attention_probe=probe)
    probe.maps()  # one [layers x heads, 3, 5]

A layer of linear attention compares no tokens: it never calls an attention function, and gives no map. Of Qwen3.5, the
maps are those of its full-attention layers, a quarter of all.

Maps over the patches of the resized image, for every layer and head, are what F-LMM segments from (Wu et al., "F-LMM:
Grounding Frozen Large Multimodal Models", arXiv 2406.05821, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Products of queries and keys held at a time: 64 MB in float32."""

Merge = Literal["mean", "max"]


@dataclass(frozen=True, slots=True)
class Look:
    """Some tokens of a sample, and an image of the same sample that stands before them.

    Args:
        row: row of the batch.
        tokens: their positions in the row; in a packed row counted from its start, not the sample's.
        image_start: position of the image's first token in the row.
        grid: (height, width) of the image in tokens, that is in merged patches; they stand row by row.
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
    """Collects, while a model runs, the attention that is looked for.

    Args:
        looks: what is looked for.
        merge: what becomes of the tokens of one look: their ``mean``, or at each place the ``max``.
        chunk_elements: products of queries and keys held at a time, by which memory does not grow with the length of
            phrases; it grows with the length of the sample, by one row for each token and head.
    """

    looks: Sequence[Look]
    merge: Merge = "mean"
    chunk_elements: int = CHUNK_ELEMENTS
    found: dict[int, list[Tensor]] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def see(self, layer: int, query: Tensor, key: Tensor, lengths: Sequence[int], scaling: float | None) -> None:
        """Take what is wanted of one layer.

        Args:
            layer: its number.
            query: [B, heads, T, D].
            key: [B, key heads, T, D]; heads are a multiple of key heads.
            lengths: of the segments of the rows: a token sees its own segment, up to itself.
            scaling: of the products; default 1 / sqrt(D).

        Raises:
            ValueError: an image does not stand before the tokens that look at it, in the same segment.
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.found[layer] = [self._one(look, query[look.row], key[look.row], lengths, scale) for look in self.looks]

    def maps(self) -> list[Tensor]:
        """Return float32 [layers x heads, height, width] of each look: weights 0 to 1, by layer, then by head."""
        layers = [self.found[number] for number in sorted(self.found)]
        return [
            torch.cat([layer[place] for layer in layers]).unflatten(1, look.grid)
            for place, look in enumerate(self.looks)
        ]

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return rows and positions of the tokens of all looks, one after another: int64 each."""
        rows = [look.row for look in self.looks for _ in look.tokens]
        tokens = [token for look in self.looks for token in look.tokens]
        return torch.tensor(rows, device=device, dtype=torch.int64), torch.tensor(tokens, device=device).long()

    def _one(self, look: Look, query: Tensor, key: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        """Return float32 [heads, height x width]."""
        start = _segment_start(look, lengths)
        keys = key[:, start : max(look.tokens) + 1]
        tokens = torch.tensor(look.tokens, device=query.device)
        image = slice(look.image_start - start, look.image_stop - start)
        at_once = max(1, self.chunk_elements // (query.shape[0] * keys.shape[1]))
        merged: Tensor | None = None
        for part in tokens.split(at_once):
            seen = _weights(query[:, part], keys, part - start, scale)[..., image]
            seen = seen.sum(1) if self.merge == "mean" else seen.amax(1)
            if merged is not None:
                seen = merged + seen if self.merge == "mean" else torch.maximum(merged, seen)
            merged = seen
        assert merged is not None, "a look has a token"
        return merged / len(look.tokens) if self.merge == "mean" else merged


def show(layer: Any, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> None:
    """Show a layer's queries and keys to the probe, where an attention function was called with one.

    Args:
        layer: the attention layer.
        query: see :meth:`AttentionProbe.see`.
        key: see there.
        options: what the function was called with: ``attention_probe``, ``segments`` and ``scaling``.
    """
    probe: AttentionProbe | None = options.get("attention_probe")
    if probe is not None:
        probe.see(layer.layer_idx, query, key, options["segments"].lengths, options.get("scaling"))


def _segment_start(look: Look, lengths: Sequence[int]) -> int:
    """Return where the segment starts that holds the tokens and the image of a look."""
    start = 0
    for length in lengths:
        if look.image_start < start + length:
            break
        start += length
    else:
        length = 0
    if not (start <= look.image_start and look.image_stop <= min(look.tokens) and max(look.tokens) < start + length):
        raise ValueError(f"{look}: the image must stand before the tokens, in the same of the segments {lengths}.")
    return start


def _weights(query: Tensor, keys: Tensor, last: Tensor, scale: float) -> Tensor:
    """Return the softmax of some queries over the keys up to their own.

    Args:
        query: [heads, n, D].
        keys: [key heads, S, D]; query head i is compared with key head i // (heads / key heads).
        last: int64 [n], the last key that each query sees.
        scale: of the products.

    Returns:
        float32 [heads, n, S].
    """
    grouped = query.unflatten(0, (keys.shape[0], -1))
    products = (grouped @ keys.transpose(-1, -2).unsqueeze(1)).flatten(0, 1).float() * scale
    hidden = torch.arange(keys.shape[1], device=keys.device) > last[:, None]
    return products.masked_fill(hidden, -torch.inf).softmax(-1)
