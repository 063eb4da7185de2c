"""Hidden states of many tokens to one vector a sample, or one a picture.

Which tokens, is found on the host: a sample is where its tokens are, in a flattened row or in a padded one, and
padding is no token of any sample. So it does not matter whether rows are packed, nor on which side they are padded.
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
    """Which hidden states are pooled together.

    Args:
        rows: int64 [n], tokens in the batch's rows one after another, those of a unit in a row.
        lengths: how many of them belong to each unit; they add up to n.
    """

    rows: Tensor
    lengths: tuple[int, ...]


def token_places(batch: Mapping[str, Any]) -> list[np.ndarray]:
    """Return where the tokens of each usable sample of a batch are: int64 [its tokens] each, in order.

    Args:
        batch: on the host, with ``cu_seq_lens_q`` if flattened, else ``attention_mask`` [B, T], 0 at padding on either
            side.
    """
    if not batch.get("num_samples", 1):
        return []
    borders: Tensor | None = batch.get("cu_seq_lens_q")
    if borders is not None:
        return [np.arange(start, stop) for start, stop in itertools.pairwise(borders.tolist())]
    mask = batch["attention_mask"].numpy().astype(bool)
    return [row * mask.shape[1] + np.flatnonzero(tokens) for row, tokens in enumerate(mask)]


def pooled_rows(
    pooling: Pooling, places: Sequence[np.ndarray], vision_mask: np.ndarray, *, by_picture: bool = False
) -> PooledRows:
    """Choose the hidden states that are pooled.

    Args:
        pooling: the last token, the first one, all of them, or those of pictures and videos.
        places: of the tokens of each sample.
        vision_mask: bool, whether each of the batch's tokens stands for a picture or video, rows one after another.
        by_picture: a unit is a picture, and its tokens are those that stand for it. Otherwise it is a sample.

    Returns:
        Units in the order of the samples, and of their pictures.
    """
    units = list(places)
    if by_picture or pooling == "vision_mean":
        units = [one[vision_mask[one]] for one in units]
    if by_picture:  # brackets stand between two pictures
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
        lengths: of each unit.

    Returns:
        float32 (float64 for hidden states of it) [units, H]; connected to ``hidden`` even without a unit.
    """
    chosen = hidden.index_select(0, rows)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    if all(length == 1 for length in lengths):
        return chosen
    return torch.stack([part.mean(0) for part in chosen.split(list(lengths))])
