"""Pool hidden states to one vector per sample, or per image.

The positions of the tokens are computed on the host, for flattened and for padded batches. Padding belongs to no
sample, so the result does not depend on packing or on the side of padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenvl.config.tasks import Pooling


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Indices of the hidden states that are pooled, by unit.

    Args:
        rows: int64 [n], indices into the tokens of all rows of the batch; the tokens of a unit are consecutive.
        lengths: Number of tokens of each unit; they add up to n.
    """

    rows: Tensor
    lengths: tuple[int, ...]


def token_places(batch: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the token indices of each usable sample of a batch: int64 [tokens of the sample] each, in order.

    Args:
        batch: Batch on the host, with ``cu_seq_lens_q`` if flattened, else ``attention_mask`` [B, T], 0 at padding on
            either side.
    """
    if not batch.get("num_samples", 1):
        return []
    borders: Tensor | None = batch.get("cu_seq_lens_q")
    if borders is not None:
        return [np.arange(start, stop) for start, stop in itertools.pairwise(borders.tolist())]
    mask = batch["attention_mask"].numpy().astype(bool)
    return [row * mask.shape[1] + np.flatnonzero(tokens) for row, tokens in enumerate(mask)]


def pooled_rows(
    pooling: Pooling, places: Sequence[np.ndarray], vision_mask: np.ndarray, *, by_image: bool = False
) -> PooledRows:
    """Choose the hidden states that are pooled.

    Args:
        pooling: Pooling over the last token, the first token, all tokens, or those of images and videos.
        places: Token indices of each sample.
        vision_mask: bool [tokens], whether each token of the batch's rows belongs to an image or video.
        by_image: Whether a unit is an image with its tokens, instead of a sample.

    Returns:
        Units in the order of the samples, and of their images.
    """
    units = list(places)
    if by_image or pooling == "vision_mean":
        units = [one[vision_mask[one]] for one in units]
    if by_image:  # start and end tokens separate two images
        units = [run for one in units for run in np.split(one, np.flatnonzero(np.diff(one) > 1) + 1)]
    if pooling in ("last_non_pad", "first"):
        units = [one[-1:] if pooling == "last_non_pad" else one[:1] for one in units]
    lengths = tuple(len(one) for one in units)
    assert all(lengths), "a sample without a token to pool"
    return PooledRows(torch.from_numpy(np.concatenate([*units, np.empty(0, np.int64)])), lengths)


def pool(hidden: Tensor, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the mean of the hidden states of each unit.

    Args:
        hidden: [tokens, H].
        rows: int64 [n], of :class:`PooledRows`.
        lengths: Number of tokens of each unit.

    Returns:
        float32 (float64 for float64 hidden states) [units, H]; connected to ``hidden`` even without a unit.
    """
    chosen = hidden.index_select(0, rows)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    if all(length == 1 for length in lengths):
        return chosen
    return torch.stack([part.mean(0) for part in chosen.split(list(lengths))])
