"""The MTP layer's loss and every gradient against a reference in plain torch, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.loading import add_mtp
from qwenvl.models.mtp.layer import mtp_of
from qwenvl.models.trainable.freezing import configure_checkpointing, set_model
from qwenvl.tasks.multi_token import MultiTokenObjective
from tests.models.conftest import BATCHES
from tests.models.loss.test_causal_lm import gradient_errors, gradients
from tests.models.mtp.reference import drafts, summed_loss, trunk
from tests.patches import install

CONTENTS = ("text", "image", "two images", "video", "video, image")


@pytest.fixture(params=["qwen3_5", "qwen3_5_moe"])
def family_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load_drafter(load_tiny: Callable[..., Any]) -> Callable[..., Any]:
    """Function of family and attention that loads a tiny model with its MTP layer, norms off their neutral values."""

    def load(family: str, attention: str = "sdpa") -> Any:
        model = load_tiny(family, attention)
        add_mtp(model, model.config._name_or_path, torch.float32)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for parameter in model.mtp.parameters():
                if parameter.dim() == 1:
                    parameter.normal_(std=0.3)
        return model

    return load


def reference_loss(model: Any, samples: list[Any], weight: float) -> tuple[Tensor, Tensor]:
    """Both losses, summed over the samples one by one."""
    language = sum(model(**one.inputs, labels=one.labels).loss * one.trained_tokens for one in samples)
    return language, weight * sum(summed_loss(model, one) for one in samples)


def test_hidden_states_are_those_of_the_published_description(family_name, load_drafter, mixture):
    model, sample = load_drafter(family_name).eval(), mixture(family_name)["video, image"]
    seen: list[Tensor] = []
    model.mtp.register_forward_hook(lambda *call: seen.append(call[-1][0, :-1]))
    install(model)
    batch = MultiTokenObjective(1.0).prepare(BATCHES["padded"]([sample]))
    with torch.no_grad():
        MultiTokenObjective(1.0).compute(model, batch)
        embeddings, hidden = trunk(model, sample.inputs)
        layer = {name.removesuffix(".weight"): value for name, value in model.mtp.named_parameters()}
        wanted = drafts(embeddings, hidden, sample.position_ids[1:, 0], layer, model.config.get_text_config())
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "segments", "eager"])
def test_loss_and_gradients_are_those_of_single_samples(
    family_name, layout, attention, load_drafter, mixture, make_batch
):
    samples = [mixture(family_name)[name] for name in CONTENTS]
    model, weight = load_drafter(family_name, attention.replace("segments", "sdpa")), 0.7
    language, mtp = reference_loss(model, samples, weight)
    (language + mtp).backward()
    wanted = gradients(model)
    model.zero_grad()
    if attention == "segments":
        attend_by_segments(model)
    install(model)
    objective = MultiTokenObjective(weight)
    loss, output = objective.compute(model, objective.prepare(BATCHES[layout](samples)))
    loss.backward()
    assert loss.item() == pytest.approx((language + mtp).item(), rel=1e-5)
    assert weight * output.mtp_loss.item() == pytest.approx(mtp.item(), rel=1e-5)
    errors = gradient_errors(model, wanted)
    assert errors.keys() == {"vision", "merger", "language", "mtp"}
    assert max(errors.values()) < 1e-4, errors


def test_weights_of_tokens_scale_their_loss(layout, load_drafter, mixture):
    samples = [mixture("qwen3_5")[name] for name in CONTENTS[:3]]
    batch = BATCHES[layout](samples)
    weights = torch.arange(batch["labels"].numel()).view_as(batch["labels"]) % 5 / 4.0
    model, objective = load_drafter("qwen3_5"), MultiTokenObjective(0.5)
    borders, wanted = [0], 0.0
    for row, sample in enumerate(samples):
        length = sample.labels.shape[1]
        own = weights[0, borders[-1] : borders[-1] + length] if layout == "flattened" else weights[row, :length]
        borders.append(borders[-1] + length)
        wanted += summed_loss(model, sample, own).item()
    install(model)
    _, output = objective.compute(model, objective.prepare(batch | {"loss_weights": weights}))
    assert output.mtp_loss.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("parts", ["language", "vision", "both"])
def test_checkpointing_changes_nothing(parts, load_drafter, mixture):
    samples = [mixture("qwen3_5")[name] for name in CONTENTS]
    found = []
    for checkpointed in (None, parts):
        model = load_drafter("qwen3_5")
        attend_by_segments(model)
        install(model)
        configure_checkpointing(model, checkpointed)
        assert model.mtp.layers[0].gradient_checkpointing == (checkpointed in ("language", "both"))
        objective = MultiTokenObjective(0.5)
        loss, _ = objective.compute(model, objective.prepare(BATCHES["flattened"](samples)))
        loss.backward()
        found.append((loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_alone_it_trains_and_the_model_gets_no_gradient(load_drafter, mixture):
    model, samples = load_drafter("qwen3_5"), [mixture("qwen3_5")["image"]]
    set_model(model, tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=False, adapted=True)
    install(model)
    objective = MultiTokenObjective(1.0)
    objective.compute(model, objective.prepare(BATCHES["padded"](samples)))[0].backward()
    layer = mtp_of(model)
    assert layer is not None
    assert gradients(model).keys() == {f"mtp.{name}" for name, _ in layer.named_parameters()}


def test_evaluations_and_generation_do_not_see_it(load_drafter, load_tiny, mixture):
    """The loss of an evaluation is the language model's to the bit, and answers are the stock model's."""
    samples = [mixture("qwen3_5")[name] for name in CONTENTS]
    model, plain = load_drafter("qwen3_5").eval(), load_tiny("qwen3_5").eval()
    install(model)
    install(plain)
    objective = MultiTokenObjective(0.5)
    batch = objective.prepare(BATCHES["flattened"](samples))
    with torch.no_grad():
        loss, output = objective.compute(model, batch)
        language, _ = super(MultiTokenObjective, objective).compute(
            plain, {name: value for name, value in batch.items() if name != "mtp_inputs"}
        )
    assert loss.item() == language.item()
    assert objective.losses_apart(output)["mtp_loss"].item() > 0
    answers = [one.generate(**samples[1].inputs, max_new_tokens=4, do_sample=False) for one in (model, plain)]
    assert torch.equal(*answers)
