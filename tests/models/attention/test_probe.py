"""Maps of attention, held against the weights that stock transformers returns from its eager attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from qwenvl.models.attention.packed import attend_by_segments, segmented_attention
from qwenvl.models.attention.probe import AttentionProbe, Look
from qwenvl.models.attention.segments import Segments
from qwenvl.tasks.grounding.module import GroundingReadout, GroundingSettings
from qwenvl.tasks.grounding.sam import MaskRefiner
from qwenvl.tasks.objective import causal_loss
from tests.models.conftest import StockSample
from tests.patches import install
from tests.tasks.grounding.sam import save_tiny_sam

CHOSEN = ("text", "two images", "video, image", "image")


def _image_spans(sample: StockSample) -> list[tuple[int, int]]:
    """Where the images of a sample start and stop, by the stock processor's own types of tokens."""
    kinds = [0, *sample.inputs["mm_token_type_ids"][0].tolist(), 0]
    starts = [place for place in range(1, len(kinds)) if kinds[place] == 1 != kinds[place - 1]]
    return [(start - 1, kinds.index(0, start) - 1) for start in starts]


def _looks(sample: StockSample, merge: int) -> list[Look]:
    """Two looks at every image of a sample: of its last three tokens, and of the one right after the image."""
    found = []
    grids = sample.inputs.get("image_grid_thw", torch.zeros(0, 3)).tolist()
    for (start, stop), (_, height, width) in zip(_image_spans(sample), grids, strict=True):
        grid = (int(height) // merge, int(width) // merge)
        assert stop - start == grid[0] * grid[1]
        last = sample.labels.shape[1]
        found += [Look(0, (last - 3, last - 2, last - 1), start, grid), Look(0, (stop,), start, grid)]
    return found


def _moved(look: Look, layout: str, row: int, offset: int) -> Look:
    row, offset = (row, 0) if layout == "padded" else (0, offset)
    return Look(row, tuple(token + offset for token in look.tokens), look.image_start + offset, look.grid)


def _expected(model: PreTrainedModel, sample: StockSample, looks: Sequence[Look]) -> list[Tensor]:
    with torch.no_grad():
        weights = model(**sample.inputs, output_attentions=True, use_cache=False).attentions
    layers = torch.cat([layer[0] for layer in weights if layer is not None])  # [layers x heads, T, T]
    return [
        layers[:, list(look.tokens), look.image_start : look.image_stop].mean(1).unflatten(1, look.grid)
        for look in looks
    ]


def _probed(model: PreTrainedModel, batch: Mapping[str, object], probe: AttentionProbe) -> None:
    with torch.no_grad():
        causal_loss(model, dict(batch) | {"attention_probe": probe}, num_trained_tokens=1.0)


def test_maps_equal_the_weights_of_the_eager_attention(family_name, layout, load_tiny, mixture, make_batch):
    stock = load_tiny(family_name, "eager").eval()
    merge = stock.config.vision_config.spatial_merge_size
    samples = [mixture(family_name)[name] for name in CHOSEN]
    looks, expected, offset = [], [], 0
    for row, sample in enumerate(samples):
        own = _looks(sample, merge)
        expected += _expected(stock, sample, own)
        looks += [_moved(look, layout, row, offset) for look in own]
        offset += sample.labels.shape[1]
    model = load_tiny(family_name).eval()
    install(model)
    attend_by_segments(model)
    probe = AttentionProbe(looks, chunk_elements=1 << 10)
    _probed(model, make_batch(layout, samples), probe)
    kinds = getattr(model.config.text_config, "layer_types", None) or ["full_attention"] * 99
    full = [number for number in range(model.config.text_config.num_hidden_layers) if kinds[number] == "full_attention"]
    assert sorted(probe.found) == full
    assert len(expected) == len(probe.maps()) == 8
    assert any(look.grid[0] != look.grid[1] for look in looks)
    for found, wanted in zip(probe.maps(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_states_equal_the_stock_hidden_states(load_tiny, mixture, make_batch, tmp_path):
    model = load_tiny("qwen3_vl").eval()
    sample = mixture("qwen3_vl")["two images"]
    looks = _looks(sample, model.config.vision_config.spatial_merge_size)
    with torch.no_grad():
        stock = model(**sample.inputs, output_hidden_states=True, use_cache=False).hidden_states[1:]
    layers, hidden_size = len(stock), model.config.text_config.hidden_size
    refiner = MaskRefiner.from_checkpoint(str(save_tiny_sam(tmp_path)), layers, hidden_size)
    readout = GroundingReadout(model.config, GroundingSettings(channels=4), refiner)
    language_model = model.model.language_model
    install(model)
    attend_by_segments(model)
    readout.watch(language_model)
    options = readout.start({"looks": looks})
    with torch.no_grad():
        causal_loss(model, make_batch("flattened", [sample]) | options, num_trained_tokens=1.0)
    places = [token for look in looks for token in look.tokens]
    assert len(readout._states) == layers
    for found, wanted in zip(readout._states, stock, strict=True):
        torch.testing.assert_close(found, wanted[0, places], atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(st.data())
def test_maps_are_rows_of_the_softmax_whatever_the_chunks(data):
    lengths = data.draw(st.lists(st.integers(3, 12), min_size=1, max_size=4))
    groups, key_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    number = data.draw(st.integers(0, len(lengths) - 1))
    start, stop = sum(lengths[:number]), sum(lengths[: number + 1])
    width = data.draw(st.integers(1, stop - start - 2))
    image_start = data.draw(st.integers(start, stop - 1 - width))
    tokens = data.draw(st.sets(st.integers(image_start + width, stop - 1), min_size=1))
    merge, chunk = data.draw(st.sampled_from(["mean", "max"])), data.draw(st.integers(1, 400))
    torch.manual_seed(0)
    query = torch.randn(1, groups * key_heads, sum(lengths), 4)
    key, value = (torch.randn(1, key_heads, sum(lengths), 4) for _ in range(2))
    probe = AttentionProbe([Look(0, tuple(sorted(tokens)), image_start, (1, width))], merge, chunk)
    layer = nn.Identity()
    layer.layer_idx = 3
    segmented_attention(layer, query, key, value, None, segments=Segments(tuple(lengths)), attention_probe=probe)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    products = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) / 2
    rows = products.masked_fill(~seen, -torch.inf).softmax(-1)[0, :, sorted(tokens), image_start : image_start + width]
    wanted = rows.mean(1) if merge == "mean" else rows.amax(1)
    torch.testing.assert_close(probe.maps()[0], wanted.unsqueeze(1))


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_does_not_grow_with_the_length_of_a_phrase():
    length, heads = 4096, 4
    query = torch.randn(1, heads, length, 8)
    probe = AttentionProbe([Look(0, tuple(range(1024, length)), 0, (32, 32))], chunk_elements=1 << 17)
    with Largest() as largest:
        probe.see(0, query, query, (length,), None)
    assert probe.maps()[0].shape == (heads, 32, 32)
    assert largest.elements <= 1 << 17 < heads * length * length // 400


@pytest.mark.parametrize("look", [Look(0, (4, 9), 6, (1, 2)), Look(0, (9,), 4, (1, 2)), Look(0, (13,), 6, (1, 2))])
def test_an_image_after_the_tokens_or_in_another_sample_is_refused(look):
    query = torch.randn(1, 2, 14, 8)
    with pytest.raises(ValueError, match="the image must precede the tokens"):
        AttentionProbe([look]).see(0, query, query, (5, 7, 2), None)
