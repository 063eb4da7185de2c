"""Every family goes through the same code: train, save, reload with stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.families import FAMILIES, get_family
from tests.e2e.runs import changed, equal_bits, history, train, weights

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is here?"}]}]


def _answers(folder: Path, picture: Path) -> bool:
    """Return whether stock transformers opens a folder completely and generates from a picture."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(picture)], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    return bool(answer.shape[1] == inputs["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("layout", ["padded", "flattened"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_saves_and_reloads(
    family: str,
    layout: str,
    tiny_checkpoint: Callable[[str], Path],
    publish: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = publish(family) if family == "qwen3_vl_moe" else tiny_checkpoint(family)  # the layout that is saved
    # All samples in every step, so that the losses of the steps can be compared.
    settings = {"data_flatten": layout == "flattened", "per_device_train_batch_size": 11}
    folder = train(checkpoint, tmp_path / "out", registry, **settings)
    before, after = weights(checkpoint), weights(folder)
    assert before.keys() == after.keys()
    trained = {name for name in before if not name.startswith("mtp.")}
    assert changed(checkpoint, folder) == trained, "a tensor did not train"
    slow = get_family(family).linear_attention and layout == "flattened" and not torch.cuda.is_available()
    assert slow == ("its linear attention runs one sample after the other" in caplog.text)
    losses = history(folder)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert _answers(folder, registry.parent / "1-0.png")


def test_experts_that_stock_transformers_saved_are_saved_as_published(
    tiny_checkpoint: Callable[[str], Path], publish: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """vLLM and llama.cpp read that layout alone, and vLLM needs ``norm_topk_prob``; tests/clients serves them."""
    family, saved = "qwen3_vl_moe", []
    for checkpoint in (tiny_checkpoint(family), publish(family)):
        folder = train(checkpoint, tmp_path / str(len(saved)), registry, max_steps=1)
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert text["norm_topk_prob"] is True and text["num_experts"] == text["num_local_experts"]
        saved.append(folder)
    assert equal_bits(*saved)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_saved_weights_have_the_names_and_layout_of_published_checkpoints(
    family: str, publish: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Qwen2-VL's and Qwen2.5-VL's files have older names than memory, Qwen3-VL-MoE's experts are transposed."""
    checkpoint = publish(family)
    folder = train(checkpoint, tmp_path / "out", registry, max_steps=1, save_strategy="steps", save_steps=1)
    shapes = {name: tensor.shape for name, tensor in weights(checkpoint).items()}
    for saved in (folder, folder / "checkpoint-1"):
        assert {name: tensor.shape for name, tensor in weights(saved).items()} == shapes
    assert _answers(folder, registry.parent / "1-0.png")
