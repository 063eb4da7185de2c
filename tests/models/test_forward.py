"""The vision call: once a batch, checked counts, and nothing left behind in the model."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from qwenvl.families import get_family
from qwenvl.models import forward
from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.attention.segments import sample_index
from qwenvl.models.forward import VisionFeatures, encode, place
from qwenvl.models.task_module import Readout
from qwenvl.models.vision.inputs import VisionInputs
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks.objective import causal_loss
from tests.patches import install, patchify_of


def generate(model: Any, sample: Any) -> list[int]:
    return model.generate(**sample.inputs, max_new_tokens=4, do_sample=False)[0].tolist()


@pytest.mark.parametrize("contents", [["text"], ["image"], ["text", "image", "video", "video, image"]])
def test_the_tower_runs_once_a_batch(family_name, layout, contents, load_tiny, mixture, make_batch):
    model = load_tiny(family_name)
    install(model)
    calls: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch(layout, [mixture(family_name)[name] for name in contents])
    causal_loss(model, batch, num_trained_tokens=1.0)
    with torch.no_grad():
        causal_loss(model.eval(), batch, num_trained_tokens=1.0)
    assert calls == [1, 1]


def test_generation_and_stock_calls_are_not_disturbed(family_name, load_tiny, mixture, make_batch):
    sample = mixture(family_name)["video, image"]
    plain, hooked = load_tiny(family_name).eval(), load_tiny(family_name)
    install(hooked)
    causal_loss(hooked, make_batch("padded", [sample]), num_trained_tokens=1.0)
    hooked.eval()
    assert generate(hooked, sample) == generate(plain, sample)
    with torch.no_grad():
        torch.testing.assert_close(hooked(**sample.inputs).logits, plain(**sample.inputs).logits, rtol=0, atol=1e-4)


def test_a_failed_call_leaves_nothing_behind(load_tiny, mixture, make_batch):
    sample = mixture("qwen3_vl")["image"]
    model = load_tiny("qwen3_vl")
    install(model)
    batch = make_batch("padded", [sample])
    with pytest.raises(ValueError, match="image and video tokens"):
        causal_loss(model, batch | {"vision_rows": batch["vision_rows"][1:]}, num_trained_tokens=1.0)
    with torch.no_grad():
        assert model(**sample.inputs).logits.shape[1] == sample.labels.shape[1]


def test_removing_the_handle_restores_the_stock_model(load_tiny, mixture, make_batch):
    model = load_tiny("qwen3_vl")
    handle = install(model)
    handle.remove()
    handle.remove()
    with pytest.raises(AssertionError, match="forward.install"):
        causal_loss(model, make_batch("padded", [mixture("qwen3_vl")["image"]]), num_trained_tokens=1.0)


def test_saved_files_do_not_change(tmp_path: Path, family_name, load_tiny, tiny_checkpoint):
    model = load_tiny(family_name)
    install(model)
    model.save_pretrained(tmp_path)
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as saved,
        safe_open(tiny_checkpoint(family_name) / "model.safetensors", "pt") as original,
    ):
        assert set(saved.keys()) == {name for name in original.keys() if not name.startswith("mtp.")}  # noqa: SIM118
    AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_copied_model_calls_its_own_layers(family_name, layout, load_tiny, mixture, make_batch):
    """As the reference of a preference loss is made. ``qwen3_5`` attends to each sample of a row apart."""
    model = load_tiny(family_name)
    install(model)
    twin = copy.deepcopy(model)
    batch = make_batch(layout, [mixture(family_name)[name] for name in ("image", "text")])
    loss = causal_loss(twin, batch, num_trained_tokens=1.0)
    loss.backward()
    missed = {name for name, parameter in twin.named_parameters() if parameter.grad is None}
    assert not missed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert loss.item() == causal_loss(model, batch, num_trained_tokens=1.0).item()


def call(model: Any, sample: Any) -> tuple[Patchify, VisionInputs]:
    rows = sample.vision_mask.flatten().nonzero().squeeze(1)
    return patchify_of(model.config._name_or_path), VisionInputs(sample.pixels, sample.media, rows)


class TestEncode:
    def test_equals_images_and_videos_encoded_apart(self, family_name, load_tiny, mixture):
        sample = mixture(family_name)["video, image"]
        model = load_tiny(family_name).eval()
        inputs = sample.inputs
        with torch.no_grad():
            image = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            video = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
            together = encode(model.model.visual, *call(model, sample))
        apart = torch.cat([*video.pooler_output, *image.pooler_output])
        torch.testing.assert_close(together.embeddings, apart, rtol=1e-5, atol=1e-6)
        assert len(together.deepstack) == len(getattr(image, "deepstack_features", None) or ())

    def test_names_both_counts_when_tokens_were_cut(self, load_tiny, mixture):
        sample, model = mixture("qwen3_vl")["image"], load_tiny("qwen3_vl")
        patchify, inputs = call(model, sample)
        features = int(sample.vision_mask.sum())
        with pytest.raises(ValueError, match=f"{features - 1} image and video tokens.*{features} features"):
            encode(model.model.visual, patchify, replace(inputs, rows=inputs.rows[1:]))

    def test_names_pixels_that_do_not_fit_the_shapes(self, load_tiny, mixture):
        sample, model = mixture("qwen3_vl")["image"], load_tiny("qwen3_vl")
        patchify, inputs = call(model, sample)
        for wrong in ({"pixels": sample.pixels[:-1]}, {"pixels": None}, {"media": ()}):
            with pytest.raises(ValueError, match=r"media have \d+ values, but pixels holds"):
                encode(model.model.visual, patchify, replace(inputs, **wrong))

    def test_media_missing_from_a_batch_with_tokens_is_an_error(self, load_tiny, mixture):
        sample, model = mixture("qwen3_vl")["image"], load_tiny("qwen3_vl")
        patchify, inputs = call(model, sample)
        with pytest.raises(ValueError, match="0 features"):
            encode(model.model.visual, patchify, replace(inputs, pixels=None, media=()))

    @pytest.mark.parametrize("trained", ["", "merger", "blocks"])
    def test_features_have_a_graph_if_something_in_the_tower_trains(self, trained, load_tiny, mixture):
        """Its input may require a gradient, as with stock checkpointing; a frozen tower keeps nothing for it."""
        model = load_tiny("qwen3_vl").requires_grad_(False)
        visual = model.model.visual
        visual.patch_embed.register_forward_hook(lambda *args: args[2].requires_grad_())
        if trained:
            next(visual.get_submodule(trained).parameters()).requires_grad_(True)
        for content in ("image", "text"):
            patchify, inputs = call(model, mixture("qwen3_vl")[content])
            features = encode(visual, patchify, inputs)
            graphs = [features.embeddings.requires_grad, *(layer.requires_grad for layer in features.deepstack)]
            assert graphs == [bool(trained)] * len(graphs)
            with torch.no_grad():
                assert not encode(visual, patchify, inputs).embeddings.requires_grad

    def test_text_alone_gives_no_rows(self, family_name, load_tiny, mixture):
        model = load_tiny(family_name)
        features = encode(model.model.visual, *call(model, mixture(family_name)["text"]))
        assert features.embeddings.shape == (0, model.config.get_text_config().hidden_size)
        assert all(layer.shape == features.embeddings.shape for layer in features.deepstack)


class TestPlace:
    """Against ``masked_scatter``, which the stock models use: the same to the bit, gradients too."""

    @staticmethod
    def placed(by_rows: bool, mask: Any, deepstack: int) -> tuple[list[Any], list[Any]]:
        torch.manual_seed(0)
        states = torch.randn(*mask.shape, 8, requires_grad=True)
        features = [torch.randn(int(mask.sum()), 8, requires_grad=True) for _ in range(1 + deepstack)]
        if by_rows:
            found = place(states, mask.flatten().nonzero().squeeze(1), VisionFeatures(features[0], tuple(features[1:])))
            placed = [found["inputs_embeds"], *found.get("deepstack_visual_embeds", ())]
        else:
            into = [states, *[torch.zeros_like(states)] * deepstack]
            placed = [one.masked_scatter(mask.unsqueeze(-1), part) for one, part in zip(into, features, strict=True)]
        weights = torch.randn(*mask.shape, 8)
        sum((one * weights).sum() for one in placed).backward()  # type: ignore[union-attr]
        return placed, [states.grad, *(part.grad for part in features)]

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("deepstack", [0, 3])
    def test_equals_a_scatter_by_mask_to_the_bit(self, share, deepstack):
        torch.manual_seed(1)
        mask = torch.rand(2, 9) < share
        ours, stock = self.placed(True, mask, deepstack), self.placed(False, mask, deepstack)
        for found, expected in zip(itertools.chain(*ours), itertools.chain(*stock), strict=True):
            assert torch.equal(found, expected)


class Mean(Readout):
    """The mean of the hidden states of a layer, times what the batch says."""

    def start(self, inputs: Any) -> dict[str, Any]:
        return {"output_hidden_states": True}

    def forward(self, output: Any, inputs: Any) -> Any:
        return output.hidden_states[1].mean() * inputs["factor"]


class TestReadout:
    def test_the_model_returns_what_the_module_of_a_task_found(self, load_tiny, mixture):
        model = load_tiny("qwen3_vl").eval()
        sample = mixture("qwen3_vl")["text"].inputs
        forward.install(model, patchify_of(model.config._name_or_path), readout=Mean())
        with torch.no_grad():
            hidden = model.model(**sample, output_hidden_states=True).hidden_states[1]
            output = model(**sample, readout_inputs={"factor": 3.0})
        torch.testing.assert_close(output.logits, 3 * hidden.mean())

    def test_what_it_found_does_not_outlive_its_call(self, load_tiny, mixture):
        """Here the projection does not run, which would have returned it; the next call is another."""
        model = load_tiny("qwen3_vl").eval()
        sample = mixture("qwen3_vl")["text"]
        forward.install(model, patchify_of(model.config._name_or_path), readout=Mean())
        with torch.no_grad():
            expected = model(**sample.inputs).logits
            model.model(**sample.inputs, readout_inputs={"factor": 1.0})
            assert torch.equal(model(**sample.inputs).logits, expected)

    def test_a_batch_of_a_task_needs_its_module(self, load_tiny, mixture):
        model = load_tiny("qwen3_vl")
        install(model)
        with pytest.raises(AssertionError, match="without its module"):
            model(**mixture("qwen3_vl")["text"].inputs, readout_inputs={})


def test_no_number_is_read_from_the_device(family_name, layout, load_tiny, mixture, make_batch):
    """With a GPU, the host would have to wait for all that runs there. A device without memory has no numbers."""
    if get_family(family_name).linear_attention:
        pytest.skip("its stock mask of padding asks whether there is any, once a batch")
    model = load_tiny(family_name)
    forward.install(model, copy.deepcopy(patchify_of(model.config._name_or_path)))
    attend_by_segments(model)
    batch = make_batch(layout, [mixture(family_name)[name] for name in ("text", "video, image")])
    on_meta = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}
    # In bfloat16, as on a GPU: in float32, torch may lack the experts' grouped product there.
    causal_loss(model.to("meta", torch.bfloat16), on_meta, num_trained_tokens=1.0).backward()
    assert model.model.visual.patch_embed.proj.weight.grad.is_meta


def test_sample_index_numbers_the_samples_of_a_row():
    index = sample_index(torch.tensor([0, 2, 3, 6], dtype=torch.int32), 6)
    assert index.tolist() == [[0, 0, 1, 2, 2, 2]]
    assert index.dtype == torch.int32


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl"])
def test_linear_attention_alone_is_told_the_samples_of_a_row(family, load_tiny, mixture, make_batch):
    """Seen by the first layer; whether kernels heed it depends on the machine."""
    model = load_tiny(family)
    install(model)
    seen: list[Any] = []
    first = model.model.language_model.layers[0]
    first.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs.get("seq_idx")), with_kwargs=True)
    samples = [mixture(family)["text"], mixture(family)["image"]]
    for layout in ("padded", "flattened"):
        causal_loss(model, make_batch(layout, samples), num_trained_tokens=1.0)
    lengths = [sample.labels.shape[1] for sample in samples]
    assert seen[0] is None
    if family == "qwen3_5":
        assert seen[1].tolist() == [[0] * lengths[0] + [1] * lengths[1]]
    else:
        assert seen[1] is None
