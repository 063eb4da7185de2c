"""Attention by segments: the samples of a row kept apart without a mask, for training calls alone."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qwenvl.models.attention import attend_by_segments, segmented_attention
from qwenvl.models.loss import causal_loss
from qwenvl.models.segments import Segments
from tests.patches import install


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 3), st.sampled_from([1, 2]), st.booleans())
def test_equals_a_mask_of_the_whole_row(lengths, rows, groups, scaled):
    torch.manual_seed(0)
    total, scale = sum(lengths), 0.3 if scaled else None
    query = torch.randn(rows, 2 * groups, total, 8, dtype=torch.float64)
    key, value = (torch.randn(rows, 2, total, 8, dtype=torch.float64) for _ in range(2))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None]) & torch.ones(total, total, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=mask, scale=scale
    )
    found, _ = segmented_attention(
        nn.Identity(), query, key, value, None, segments=Segments(tuple(lengths)), scaling=scale
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


class Squares(TorchDispatchMode):
    """Notes the operations that return a square of so many tokens a side."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.found = side, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and list(result.shape[-2:]) == [self.side, self.side]:
            self.found.add(str(func))
        return result


@pytest.mark.parametrize("segments", [True, False])
def test_no_mask_of_a_packed_row_is_made(segments, load_tiny, mixture, make_batch):
    model = load_tiny("qwen3_vl")
    install(model)
    if segments:
        attend_by_segments(model)
    batch = make_batch("flattened", list(mixture("qwen3_vl").values()))
    with Squares(batch["input_ids"].shape[1]) as squares:
        causal_loss(model, batch, num_trained_tokens=1.0).backward()
    assert bool(squares.found) != segments, squares.found


def test_a_call_without_segments_is_refused_rather_than_let_samples_see_each_other(load_tiny, mixture):
    model = load_tiny("qwen3_vl")
    attend_by_segments(model)
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\)"):
        model(**mixture("qwen3_vl")["text"].inputs)
    model.set_attn_implementation("sdpa")
    model(**mixture("qwen3_vl")["text"].inputs)


def test_saved_configs_do_not_name_the_attention(load_tiny, tmp_path):
    model = load_tiny("qwen3_vl")
    attend_by_segments(model)
    model.save_pretrained(tmp_path)
    assert "segments" not in (tmp_path / "config.json").read_text()
