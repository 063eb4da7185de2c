"""Attention by segments: the samples of a row kept apart without a mask, for training calls alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.models.attention.packed import attend_by_segments, refuse_unknown_switches, segmented_attention
from qwenvl.models.attention.segments import Segments
from qwenvl.tasks.objective import causal_loss
from qwenvl.utils.errors import UserError
from tests.patches import install


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.none() | st.integers(1, 13),
)
def test_equals_a_mask_of_the_whole_row(lengths, rows, groups, scaled, window):
    torch.manual_seed(0)
    total, scale = sum(lengths), 0.3 if scaled else None
    query = torch.randn(rows, 2 * groups, total, 8, dtype=torch.float64)
    key, value = (torch.randn(rows, 2, total, 8, dtype=torch.float64) for _ in range(2))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    mask = (owner[:, None] == owner[None]) & (distance >= 0) & (distance < (window or total))
    expected = functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=mask, scale=scale
    )
    segments = Segments(tuple(lengths))
    found, _ = segmented_attention(
        nn.Identity(), query, key, value, None, segments=segments, scaling=scale, sliding_window=window
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert found.is_contiguous()


def test_weights_are_dropped_as_often_as_asked_and_the_rest_made_up_for():
    torch.manual_seed(0)
    query, key = (torch.randn(1, 8, 6, 4) for _ in range(2))
    value = torch.eye(6).expand(1, 8, 6, 6)  # so that the result is the weights
    whole, _ = segmented_attention(nn.Identity(), query, key, value, None, segments=Segments((6,)))
    some, _ = segmented_attention(nn.Identity(), query, key, value, None, segments=Segments((6,)), dropout=0.25)
    kept = some != 0
    assert 0.6 < kept.sum() / (whole != 0).sum() < 0.9
    torch.testing.assert_close(some[kept], whole[kept] / 0.75)


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


def _folder_with(checkpoint: Path, folder: Path, **switches: Any) -> Path:
    """Copy a checkpoint, and change the config of its language model."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).update(switches)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("layout", ["padded", "flattened"])
def test_a_sliding_window_is_that_of_the_stock_model(family, layout, tiny_checkpoint, mixture, make_batch, tmp_path):
    switches = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": None}
    folder = _folder_with(tiny_checkpoint(family), tmp_path / "windowed", **switches)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    samples = list(mixture(family).values())
    losses, counts = [], []
    for sample in samples:
        labels = sample.labels[0, 1:]
        logits = stock(**sample.inputs).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, labels, reduction="sum").item())
        counts.append(int((labels != -100).sum()))
    ours = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    assert "sliding_attention" in ours.config.get_text_config().layer_types
    install(ours)
    attend_by_segments(ours)
    loss = causal_loss(ours, make_batch(layout, samples), num_trained_tokens=sum(counts))
    assert loss.item() == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


@pytest.mark.parametrize(
    ("language_model", "switches", "named"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": None}, "attn_logit_softcapping 50.0"),
        ("gemma2", {"attn_logit_softcapping": None}, "final_logit_softcapping 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("cohere", {}, "logit_scale 0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ("llama4_text", {}, "chunked_attention"),
    ],
)
def test_switches_that_would_be_passed_over_are_refused_by_name(language_model, switches, named):
    config = AutoConfig.for_model(language_model, **switches)
    with pytest.raises(UserError) as caught:
        refuse_unknown_switches(config)
    assert named in str(caught.value) and language_model in str(caught.value)


@pytest.mark.parametrize("language_model", ["qwen2", "qwen3", "llama", "mistral", "granite", "gemma3_text", "qwen3_vl"])
def test_models_that_are_computed_as_they_are_pass(language_model):
    refuse_unknown_switches(AutoConfig.for_model(language_model))


def test_maps_know_no_window():
    windowed = AutoConfig.for_model("qwen2", use_sliding_window=True, max_window_layers=0)
    refuse_unknown_switches(windowed)
    with pytest.raises(UserError, match="sliding_window 4096"):
        refuse_unknown_switches(windowed, shows_maps=True)
    refuse_unknown_switches(AutoConfig.for_model("qwen2"), shows_maps=True)


@pytest.mark.parametrize("asked", [{"s_aux": torch.zeros(2)}, {"softcap": 30.0}])
def test_what_no_switch_names_is_refused_in_the_layer(asked):
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match="sinks or caps"):
        segmented_attention(nn.Identity(), query, query, query, None, segments=Segments((3,)), **asked)
