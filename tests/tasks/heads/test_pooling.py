"""Pooling against a plain loop, packed and padded on either side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwenvl.config.tasks import Pooling
from qwenvl.tasks.heads.pooling import pool, pooled_rows, token_places

POOLINGS: tuple[Pooling, ...] = ("last_non_pad", "first", "mean", "vision_mean")
LAYOUTS = ("flattened", "right", "left")
WIDTH = 3

# a sample: whether each of its tokens stands for a picture, with a bracket on either side of each
samples = st.lists(
    st.lists(st.integers(1, 4), min_size=1, max_size=3).map(
        lambda pictures: [flag for tokens in pictures for flag in (False, *[True] * tokens, False)]
    ),
    min_size=1,
    max_size=4,
)


def lay_out(flags: list[list[bool]], layout: str, seed: int) -> tuple[dict[str, Any], list[Tensor], Tensor]:
    """Return a batch, the states of each sample, and the states of the batch [B, T, H], noise at padding."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(len(one), WIDTH, generator=generator) for one in flags]
    if layout == "flattened":
        borders = torch.tensor(np.cumsum([0, *map(len, flags)]), dtype=torch.int32)
        batch = {"cu_seq_lens_q": borders, "vision_mask": torch.tensor(np.concatenate(flags))[None]}
        return batch, states, torch.cat(states)[None]
    longest = max(map(len, flags))
    batch = {name: torch.zeros(len(flags), longest, dtype=torch.long) for name in ("attention_mask", "vision_mask")}
    hidden = torch.full((len(flags), longest, WIDTH), torch.nan)
    for row, one in enumerate(flags):
        place = slice(longest - len(one), longest) if layout == "left" else slice(0, len(one))
        batch["attention_mask"][row, place] = 1
        batch["vision_mask"][row, place] = torch.tensor(one).long()
        hidden[row, place] = states[row]
    return batch | {"vision_mask": batch["vision_mask"].bool()}, states, hidden


def oracle(pooling: str, states: Tensor, flags: list[bool]) -> Tensor:
    if pooling == "first":
        return states[0]
    if pooling == "last_non_pad":
        return states[len(flags) - 1]
    chosen = [state for state, flag in zip(states, flags, strict=True) if flag or pooling == "mean"]
    total = torch.zeros(WIDTH)
    for state in chosen:
        total = total + state
    return total / len(chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", POOLINGS)
@given(flags=samples, seed=st.integers(0, 99))
def test_each_sample_is_pooled_over_its_own_tokens(
    pooling: Pooling, layout: str, flags: list[list[bool]], seed: int
) -> None:
    batch, states, hidden = lay_out(flags, layout, seed)
    pooled = pooled_rows(pooling, token_places(batch), batch["vision_mask"].flatten().numpy())
    found = pool(hidden.flatten(0, 1), pooled.rows, pooled.lengths)
    expected = torch.stack([oracle(pooling, *pair) for pair in zip(states, flags, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", POOLINGS)
@given(flags=samples, seed=st.integers(0, 99))
def test_each_picture_is_pooled_over_its_own_tokens(
    pooling: Pooling, layout: str, flags: list[list[bool]], seed: int
) -> None:
    batch, states, hidden = lay_out(flags, layout, seed)
    mask = batch["vision_mask"].flatten().numpy()
    pooled = pooled_rows(pooling, token_places(batch), mask, by_image=True)
    found = pool(hidden.flatten(0, 1), pooled.rows, pooled.lengths)
    expected = []
    for of_sample, one in zip(states, flags, strict=True):
        edges = [place for place in range(len(one)) if one[place] and not one[place - 1]]
        for start in edges:
            stop = next(place for place in range(start, len(one)) if not one[place])
            expected.append(oracle(pooling, of_sample[start:stop], [True] * (stop - start)))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_a_batch_that_only_fills_a_step_pools_nothing_and_stays_connected() -> None:
    hidden = torch.ones(2, WIDTH, requires_grad=True)
    places = token_places({"num_samples": 0, "attention_mask": torch.ones(1, 2)})
    pooled = pooled_rows("mean", places, np.zeros(2, bool))
    found = pool(hidden, pooled.rows, pooled.lengths)
    assert found.shape == (0, WIDTH)
    found.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_states_of_half_precision_are_pooled_in_float32() -> None:
    hidden = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    pooled = pooled_rows("mean", [np.arange(2)], np.zeros(2, bool))
    assert pool(hidden, pooled.rows, pooled.lengths).tolist() == [[128.5]]  # bfloat16 would say 128
