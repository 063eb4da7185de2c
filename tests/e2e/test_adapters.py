"""Adapters, from the command line to a folder that stock PEFT opens and that merges into one that loads alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.cli.merge_lora import main as merge_main
from qwenvl.families import FAMILIES
from qwenvl.models.adapter_merging import logits_of, sample_inputs
from qwenvl.train.train_qwen import main
from tests.e2e.runs import LORA, changed, equal_bits, flags, history, read_annotations, train, weights

EVALUATION = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset_use": "held_out"}


def merge(adapter: Path, output: Path) -> Path:
    assert merge_main(["--adapter", str(adapter), "--output", str(output)]) == 0
    return output


def loss_of(model: Path, output: Path, registry: Path) -> float:
    """Return the evaluation loss that the trainer finds for a checkpoint before it trains it."""
    settings = {**EVALUATION, "eval_on_start": True, "max_steps": 1, "eval_steps": 5}
    return history(train(model, output, registry, **settings), "eval_loss")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_folder_has_the_loss_and_the_logits_of_the_trained_adapters(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Adapters on the language model and the tower, and mergers trained whole, which are saved with them."""
    base = tiny_checkpoint(family)
    settings = {**LORA, **EVALUATION, "lora_target": "language,vision", "tune_mm_mlp": True}
    adapter = train(base, tmp_path / "adapter", registry, **settings)
    assert not list(adapter.glob("model*.safetensors"))
    merged = merge(adapter, tmp_path / "merged")
    assert loss_of(merged, tmp_path / "again", registry) == pytest.approx(history(adapter, "eval_loss")[-1], rel=1e-5)
    assert weights(merged).keys() == weights(base).keys()
    different = changed(base, merged)
    for part in (r"visual\.merger\.", r"visual\.blocks\.", r"model\.layers\."):
        assert any(re.search(part, name) for name in different), part
    opened = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    alone = AutoModelForImageTextToText.from_pretrained(merged).eval()
    inputs = sample_inputs(AutoProcessor.from_pretrained(merged), torch.device("cpu"))
    directly = AutoModelForImageTextToText.from_pretrained(adapter).eval()  # transformers finds the base itself
    torch.testing.assert_close(logits_of(directly, inputs), logits_of(opened, inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(opened, inputs), logits_of(alone, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"lora_target": "all"},
        {"lora_target": r".*layers\.[01]\.self_attn\..*"},
        {"lora_target": "merger", "tune_mm_vision": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_every_kind_of_adapter_merges(
    kind: dict[str, Any], tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint("qwen3_vl")
    adapter = train(base, tmp_path / "adapter", registry, **{**LORA, **EVALUATION, **kind})
    merged = merge(adapter, tmp_path / "merged")
    rel = 3e-2 if "bf16" in kind else 1e-5
    assert loss_of(merged, tmp_path / "again", registry) == pytest.approx(history(adapter, "eval_loss")[-1], rel=rel)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["use_rslora"]) == (kind.get("lora_dropout", 0.0), "use_rslora" in kind)
    if "layers" in kind.get("lora_target", ""):
        names = [name for name in changed(base, merged) if name.endswith(".weight")]
        assert len(names) == 8 and all(".layers.0.self" in name or ".layers.1.self" in name for name in names)


def test_trained_weights_stay_float32_beside_a_base_in_bfloat16(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    settings = {**LORA, "tune_mm_mlp": True, "bf16": True, "additional_tokens": "slowly"}
    adapter = train(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **settings)
    assert {tensor.dtype for tensor in weights(adapter).values()} == {torch.float32}


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_resumed_adapters_end_bitwise_like_those_that_were_never_stopped(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    settings = {**LORA, "tune_mm_mlp": True, "lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
    settings |= {"max_steps": 4, "additional_tokens": "slowly"}
    full = train(tiny_checkpoint(family), tmp_path / "full", registry, **settings)
    assert changed(full / "checkpoint-2", full) == set(weights(full)), "a tensor that does not train"
    shutil.copytree(full / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train(tiny_checkpoint(family), tmp_path / "resumed", registry, **settings)
    assert equal_bits(full, resumed)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])  # tied and untied
def test_added_tokens_train_beside_adapters_and_nothing_else_of_the_vocabulary(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint(family)
    settings = {**LORA, **EVALUATION, "additional_tokens": "slowly"}
    adapter = train(base, tmp_path / "adapter", registry, **settings)
    merged = merge(adapter, tmp_path / "merged")
    assert loss_of(merged, tmp_path / "again", registry) == pytest.approx(history(adapter, "eval_loss")[-1], rel=1e-5)
    tokenizer = AutoProcessor.from_pretrained(merged).tokenizer
    token = tokenizer.convert_tokens_to_ids("slowly")
    assert tokenizer("a slowly.")["input_ids"].count(token) == 1
    assert token in tokenizer.encode(read_annotations(registry, "mixed")[1]["conversations"][1]["value"])
    names = [name for name in weights(base) if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(names) == (1 if family == "qwen3_vl" else 2)
    for name in names:
        rows = (weights(base)[name] != weights(merged)[name]).any(1).nonzero().flatten().tolist()
        assert rows == [token], name


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_added_tokens_enlarge_a_vocabulary_that_is_full(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """With the language model trained whole; tying and the multiple of the number of rows are kept."""
    base = tiny_checkpoint(family)
    rows = next(len(tensor) for name, tensor in weights(base).items() if name.endswith("embed_tokens.weight"))
    tokens = [f"<loc_{number}>" for number in range(rows)]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"additional_tokens": tokens}))
    assert main([str(recipe), *flags(base, tmp_path / "out", registry, max_steps=1)]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer.convert_tokens_to_ids(tokens[-1]) == len(tokenizer) - 1 < model.config.get_text_config().vocab_size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == ("lm_head.weight" not in weights(base))
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tune_mm_mlp": True, "lora_target": "all"}, ["--tune_mm_mlp True", "--lora_target all"]),
        ({"tune_mm_llm": True, "lora_target": "vision"}, ["--tune_mm_llm True", "whole language"]),
        ({"lora_target": "langage"}, ["'langage'", "'language'"]),
        ({"lora_target": "*"}, ["regular expression"]),
        ({"lora_target": r".*nothing.*"}, ["matches no linear layer", "such as model.visual.blocks.0."]),
        ({"lora_target": r".*lm_head"}, ["matches no linear layer", "lm_head"]),
        ({"lora_target": r".*merger.*", "tune_mm_mlp": True}, ["--tune_mm_mlp True"]),
        ({"lora_r": 0}, ["--lora_r"]),
        ({"quantization_bit": 4}, ["--quantization_bit 4", "CUDA"]),
        ({"lora_enable": False, "quantization_bit": 4, "tune_mm_mlp": True}, ["--lora_enable True"]),
        ({"lora_enable": False, "tune_mm_mlp": True, "additional_tokens": "x"}, ["--additional_tokens"]),
        ({"additional_tokens": " x"}, ["white space"]),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_one_message(
    settings: dict[str, Any],
    words: list[str],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    fail: Callable[[list[str]], str],
) -> None:
    message = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **{**LORA, **settings}))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_stacked_experts_have_adapters_that_merge_and_resume(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the default target; the fresh process of ``--verify_export`` opens them with stock PEFT."""
    base = tiny_checkpoint(family)
    settings = {**LORA, **EVALUATION, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    adapter = train(base, tmp_path / "adapter", registry, **settings, verify_export=True)
    assert "adapters of rank 2 (--lora_r / experts per token) in each of 4 experts, in " in caplog.text
    assert "Verified: a fresh process opened" in caplog.text
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    shutil.copytree(adapter / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert equal_bits(train(base, tmp_path / "resumed", registry, **settings), adapter)
    merged = merge(adapter, tmp_path / "merged")
    assert loss_of(merged, tmp_path / "again", registry) == pytest.approx(history(adapter, "eval_loss")[-1], rel=1e-5)
    assert weights(merged).keys() == weights(base).keys()
    experts = {name for name in weights(base) if ".mlp.experts." in name and not name.startswith("mtp.")}
    assert experts and changed(base, merged) >= experts
    opened = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    alone = AutoModelForImageTextToText.from_pretrained(merged).eval()
    inputs = sample_inputs(AutoProcessor.from_pretrained(merged), torch.device("cpu"))
    torch.testing.assert_close(logits_of(opened, inputs), logits_of(alone, inputs), rtol=1e-4, atol=1e-4)


def test_experts_may_be_left_out_or_refuse_settings(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    fail: Callable[[list[str]], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = tiny_checkpoint("qwen3_vl_moe")
    refused = flags(base, tmp_path / "refused", registry, **LORA, lora_dropout=0.1, dry_run=True)
    assert "--lora_dropout 0.1 with --lora_target language,experts" in fail(refused)
    adapter = train(base, tmp_path / "out", registry, **LORA, lora_target="language", lora_dropout=0.1)
    assert "weights have no adapters (--lora_target language,experts gives them some)" in caplog.text
    assert all(".self_attn." in name or ".mlp.gate_proj" in name for name in weights(adapter) if "down" not in name)


def test_merging_refuses_what_does_not_fit(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_checkpoint("qwen3_vl")
    adapter = train(base, tmp_path / "adapter", registry, **{**LORA, "tune_mm_mlp": True}, max_steps=1)
    tensors = weights(adapter)
    partial = {name: tensor for name, tensor in tensors.items() if "merger" not in name}
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}
    zero = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    wider = {name: torch.cat([tensor, tensor], -1) if "lora_A" in name else tensor for name, tensor in tensors.items()}
    for number, (broken, words) in enumerate(
        [(renamed, "fit nothing"), (zero, "weights changed"), (wider, "does not fit"), (partial, "does not fit")]
    ):
        folder = shutil.copytree(adapter, tmp_path / f"broken-{number}")
        save_file(broken, folder / "adapter_model.safetensors", {"format": "pt"})
        caplog.clear()
        assert merge_main(["--adapter", str(folder), "--output", str(tmp_path / f"merged-{number}")]) == 1
        assert words in caplog.text and not (tmp_path / f"merged-{number}").exists()
    caplog.clear()
    assert merge_main(["--adapter", str(base), "--output", str(tmp_path / "merged")]) == 1
    assert "holds no adapters" in caplog.text


def test_adapters_train_on_a_quantized_base_and_merge_into_the_whole_one(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """On the CPU, where bitsandbytes trains too, though too slowly for anything but a test: so it is let through."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("qwenvl.config.validate._check_quantization", lambda *_: None)
    base = tiny_checkpoint("qwen3_vl")
    settings = {**LORA, "bf16": True, "tune_mm_mlp": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    quantized = {**settings, "quantization_bit": 4}
    adapter = train(base, tmp_path / "adapter", registry, **quantized, verify_export=True)
    assert "its base had 4 bits in training" in caplog.text
    plain = train(base, tmp_path / "plain", registry, **settings)
    assert history(adapter) == pytest.approx(history(plain), rel=0.05)
    assert history(adapter) != history(plain), "nothing was quantized"
    shutil.copytree(adapter / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert equal_bits(train(base, tmp_path / "resumed", registry, **quantized), adapter)
    assert weights(merge(adapter, tmp_path / "merged")).keys() == weights(base).keys()


def test_an_extended_context_stays_with_the_adapters(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    """Stock loading knows the base's context; merging knows that of training, and resuming asks for the same."""
    base, yarn = tiny_checkpoint("qwen3_vl"), {"rope_scaling": "yarn", "rope_factor": 2}
    settings = {**LORA, "save_strategy": "steps", "save_steps": 2}
    adapter = train(base, tmp_path / "adapter", registry, **settings, **yarn)
    assert "was trained with" in fail(flags(base, adapter, registry, **settings))
    config = json.loads((merge(adapter, tmp_path / "merged") / "config.json").read_text())
    assert config["text_config"]["rope_parameters"]["factor"] == 2


def test_a_folder_of_adapters_is_no_checkpoint_to_start_from(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    adapter = train(tiny_checkpoint("qwen3_vl"), tmp_path / "adapter", registry, **LORA, max_steps=1)
    assert "tools/merge_lora.py --adapter" in fail(flags(adapter, tmp_path / "out", registry))
