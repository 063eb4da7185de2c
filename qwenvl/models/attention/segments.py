"""Boundaries of the samples in a flattened row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Lengths of the samples of a row, for attention.

    A class rather than a tuple: torch.compile specialises on a tuple's contents, and would compile again for each
    number of samples.

    Args:
        lengths: Number of tokens of each sample of a flattened row, or the length of padded rows; Python numbers.
    """

    lengths: tuple[int, ...]


def sample_index(cu_seq_lens: Tensor, length: int) -> Tensor:
    """Number the samples of a flattened row: int32 [1, T], 0 for the first sample's tokens, 1 for the second's, ...

    The convolution of linear attention (``causal_conv1d_fn``) clears its window by these numbers. transformers passes
    the boundaries ``cu_seq_lens_q`` to the recurrent part only; without the numbers, the convolution mixes samples.

    Args:
        cu_seq_lens: int32 [number of samples + 1], start of each sample, and the row's length.
        length: Number of tokens of the row.
    """
    tokens = torch.arange(length, device=cu_seq_lens.device)
    return (torch.searchsorted(cu_seq_lens, tokens, right=True) - 1).to(torch.int32).unsqueeze(0)
