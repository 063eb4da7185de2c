"""Where the samples of a flattened row are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """How long the samples of a row are, for attention.

    An object and no tuple: torch.compile looks into a tuple, and would compile anew for each number of samples.

    Args:
        lengths: tokens of each sample of a flattened row, or the length of padded rows, Python numbers.
    """

    lengths: tuple[int, ...]


def sample_index(cu_seq_lens: Tensor, length: int) -> Tensor:
    """Number the samples of a flattened row: int32 [1, T], 0 for the first sample's tokens, 1 for the second's, ...

    The convolution of linear attention (``causal_conv1d_fn``) clears its window by these numbers; transformers hands
    the boundaries ``cu_seq_lens_q`` to the recurrent part alone, and without the numbers the convolution leaks.

    Args:
        cu_seq_lens: int32 [number of samples + 1], where each sample starts, and the row's length.
        length: tokens of the row.
    """
    tokens = torch.arange(length, device=cu_seq_lens.device)
    return (torch.searchsorted(cu_seq_lens, tokens, right=True) - 1).to(torch.int32).unsqueeze(0)
