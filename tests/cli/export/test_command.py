"""tools/export.py: FP8 copies of small models, opened by stock transformers and compared with what they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.cli.export.command import main
from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.models.loading import load_model

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
DENSE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
QUANTIZED = re.compile(
    r"^model\.(language_model\.)?layers\.\d+\.(mlp\.\w+_proj|self_attn\.\w_proj|"
    r"linear_attn\.(in_proj_qkv|in_proj_z|out_proj))\.weight$"
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function of a family that makes a model whose layers can be divided into blocks of 128."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        build_tiny_checkpoint(family, folder)
        config = AutoConfig.from_pretrained(folder)
        text = config.text_config
        for name, value in WIDE.items():
            setattr(text, name, value)
        config.vision_config.out_hidden_size = config.vision_config.hidden_size = WIDE["hidden_size"]
        if family == "qwen2_vl":
            config.vision_config.embed_dim = 64
        else:
            config.vision_config.hidden_size = 32
        if family.startswith("qwen3"):
            text.head_dim = 32
            text.rope_parameters["mrope_section"] = [6, 5, 5] if family == "qwen3_vl" else [2, 1, 1]
        else:
            text.rope_parameters["mrope_section"] = [6, 5, 5]
        if family == "qwen3_5":
            text.linear_num_key_heads, text.linear_num_value_heads = 8, 8
        mtp = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "mtp" in name}
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        if mtp:
            save_file(load_file(folder / "model.safetensors") | mtp, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    generator = np.random.default_rng(0)
    rows = []
    for number in range(6):
        pixels = generator.integers(0, 255, (64, 64 + 8 * number, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>What is {number}?"}, {"from": "gpt", "value": "A thing."}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    rows.append({"image": "gone.png", "conversations": rows[0]["conversations"]})
    (tmp_path / "d.json").write_text(json.dumps(rows))
    return ["--annotation_path", str(tmp_path / "d.json"), "--data_path", str(tmp_path), "--max_new_tokens", "4"]


@pytest.mark.parametrize("family", DENSE)
def test_a_copy_stands_for_the_weights_and_says_how_far_it_is_off(
    family: str,
    wide: Callable[[str], Path],
    data: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, output = wide(family), tmp_path / "fp8"
    arguments = ["--to", "fp8", "--model_name_or_path", str(folder), "--output", str(output), *data, "--device", "cpu"]
    assert main(arguments) == 0, caplog.text
    whole, small = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    quantized = {name for name, tensor in small.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantized == {name for name in whole if QUANTIZED.match(name)}
    assert {name for name in small if name not in whole} == {f"{name}_scale_inv" for name in quantized}
    assert all(torch.equal(whole[name], small[name]) for name in whole if name not in quantized)
    for name in quantized:
        scale = small[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert (small[name].float() * scale - whole[name]).abs().max() <= whole[name].abs().max() / 16
    stock = AutoModelForImageTextToText.from_pretrained(output)  # a CPU: dequantized
    exact = load_model(str(output), dtype=torch.float32, attn_implementation="sdpa").state_dict()
    assert all(torch.allclose(tensor.float(), exact[name], atol=1e-2) for name, tensor in stock.state_dict().items())
    assert AutoProcessor.from_pretrained(output).chat_template
    card = (output / "README.md").read_text()
    assert "| samples | 6 |" in card
    mean = float(re.search(r"mean difference \| ([0-9.]+) nats", card).group(1))  # type: ignore[union-attr]
    assert 0 < mean < 1
    assert "Left out" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".fp8")]
    assert main(arguments) == 1
    assert "already holds files" in caplog.text


def test_a_copy_that_is_off_is_not_kept(
    wide: Callable[[str], Path], data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--to", "fp8", "--model_name_or_path", str(wide("qwen3_vl")), *data, "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "fp8"), "--max_difference", "1e-6"]) == 1
    assert "more than --max_difference 1e-06: it is not kept" in caplog.text
    assert not [path for path in tmp_path.iterdir() if "fp8" in path.name]


def test_log_probabilities_that_are_no_numbers_are_not_kept(
    wide: Callable[[str], Path], data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = wide("qwen3_vl")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.norm.weight"] *= float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    arguments = ["--to", "fp8", "--model_name_or_path", str(folder), *data, "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "fp8")]) == 1
    assert "are not finite: the copy is not kept" in caplog.text
    assert not (tmp_path / "fp8").exists()


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("qwen3_vl_moe", [], "is a mixture of experts, whose FP8 no client was tried with"),
        ("qwen3_vl", [], "no layer of its language model has sides that are multiples of 128"),
        ("qwen3_vl", ["--temperature", "1"], "--temperature: no effect here"),
        ("qwen3_vl", ["--max_difference", "0"], "--max_difference above 0"),
        ("qwen3_vl", ["--annotation_path", "none.json"], "none.json"),
    ],
)
def test_what_cannot_be_exported_is_said(
    family: str,
    more: list[str],
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    data: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tiny_checkpoint(family)
    flags = ["--to", "fp8", "--model_name_or_path", str(folder), "--output", str(tmp_path / "fp8"), *data, *more]
    assert main(flags) == 1
    assert message in caplog.text
    assert not (tmp_path / "fp8").exists()


def test_a_folder_of_adapters_or_of_nothing_is_refused(
    tmp_path: Path, data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--to", "fp8", "--model_name_or_path", str(tmp_path), "--output", str(tmp_path / "fp8"), *data]
    assert main(flags) == 1
    assert "is no folder of a model: it has no config.json" in caplog.text
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(flags) == 1
    assert "holds adapters: merge them" in caplog.text
    assert main(flags[2:]) == 1
    assert "Name the form and the folder of the copy" in caplog.text
