"""The numbers of the samples of a flattened row."""

from __future__ import annotations

import torch

from qwenvl.models.attention.segments import sample_index


def test_tokens_are_numbered_by_their_sample() -> None:
    found = sample_index(torch.tensor([0, 2, 3, 6], dtype=torch.int32), 6)
    assert found.tolist() == [[0, 0, 1, 2, 2, 2]]
    assert found.dtype == torch.int32


def test_numbers_are_made_where_the_borders_are() -> None:
    assert sample_index(torch.tensor([0, 2, 3], dtype=torch.int32, device="meta"), 3).is_meta


def test_tokens_behind_the_last_border_belong_to_no_sample() -> None:
    assert sample_index(torch.tensor([0, 1, 3], dtype=torch.int32), 5).tolist() == [[0, 1, 1, 2, 2]]
