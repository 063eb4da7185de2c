"""Adapters on FP8 checkpoints: trained, verified, asked and merged as on the dequantized weights, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl.cli.merge_lora import main as merge_main
from qwenvl.cli.predict import command as predict
from qwenvl.models.loading import add_mtp, load_model
from qwenvl.train.checkpoint.carried_tensors import carried_tensors
from qwenvl.train.checkpoint.folder_check import read_headers
from qwenvl.utils.errors import UserError
from tests.e2e.runs import LORA, equal_bits, flags, history, train, weights

BLOCK = 16
"""Rows and columns of a block; of published checkpoints, 128."""
Made = tuple[Path, Path]


def quantize(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight in FP8, the scale of each block, and by hand what both stand for."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = (blocks.abs().amax((1, 3)) / 448).to(scale_dtype)
    small = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    dequantized = small.float() * scales.float()[:, None, :, None]
    return small.reshape(weight.shape), scales, dequantized.reshape(weight.shape)


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An FP8 checkpoint as Qwen publishes them (tower and ``lm_head`` are whole), and the same by hand in bf16."""
    fp8, by_hand = (tmp_path_factory.mktemp("fp8") / name for name in ("fp8", "by_hand"))
    small, whole = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(tiny_checkpoint("qwen3_vl") / "model.safetensors").items():
        if "language_model.layers" in name and name.endswith("_proj.weight"):
            small[name], small[f"{name}_scale_inv"], dequantized = quantize(weight)
            whole[name] = dequantized.to(torch.bfloat16)
        else:
            small[name] = whole[name] = weight.to(torch.bfloat16)
    for folder, tensors in ((fp8, small), (by_hand, whole)):
        write(tiny_checkpoint("qwen3_vl"), folder, tensors, quantized=folder == fp8)
    return fp8, by_hand


def write(source: Path, folder: Path, tensors: dict[str, Tensor], *, quantized: bool) -> None:
    """Write a checkpoint in bfloat16 or FP8, whose other files are those of another one."""
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "bfloat16"
    if quantized:
        scaled = {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")}
        kept = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
        method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
        left = sorted(kept - {name.removesuffix(".weight") for name in scaled})
        config["quantization_config"] = {**method, "fmt": "e4m3", "modules_to_not_convert": ["lm_head", *left]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_are_scale_times_weight_in_one_type(
    made: Made, dtype: torch.dtype, on_meta: bool, tmp_path: Path
) -> None:
    fp8, by_hand = made
    model = load_model(str(fp8), dtype=dtype, attn_implementation="sdpa", on_meta=on_meta)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if on_meta:
        return
    expected = load_file(by_hand / "model.safetensors")
    found = model.state_dict()
    assert all(torch.equal(found[name].to(torch.bfloat16), weight) for name, weight in expected.items())
    small = load_file(fp8 / "model.safetensors")
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    exact = small[name].float() * small[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert torch.equal(found[name], exact.to(dtype))
    model.save_pretrained(tmp_path)  # stock transformers would quantize again, the embeddings too
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {dtype}
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")


@pytest.mark.parametrize("precision", [{}, {"bf16": True, "model_dtype": "bfloat16"}], ids=["float32", "bf16"])
def test_adapters_are_those_of_the_dequantized_weights(
    made: Made, precision: dict[str, object], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained, opened again by stock transformers and PEFT, merged and asked."""
    fp8, by_hand = made
    settings = {**LORA, "max_steps": 2, **precision}
    found = train(fp8, tmp_path / "found", registry, **settings, verify_export=True)
    assert "FP8 weights, dequantized: " in caplog.text and "Verified: a fresh process opened" in caplog.text
    wanted = train(by_hand, tmp_path / "wanted", registry, **settings)
    if precision:  # in float32, the weights by hand have been rounded
        assert equal_bits(found, wanted) and history(found) == history(wanted)
    assert json.loads((found / "adapter_config.json").read_text())["base_model_name_or_path"] == str(fp8)
    merged = [tmp_path / f"merged-{name}" for name in ("found", "wanted")]
    for base, output in zip((fp8, by_hand), merged, strict=True):
        assert merge_main(["--adapter", str(wanted), "--base", str(base), "--output", str(output)]) == 0
    assert equal_bits(*merged)
    assert {tensor.dtype for tensor in weights(merged[0]).values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((merged[0] / "config.json").read_text())
    AutoModelForImageTextToText.from_pretrained(merged[0])


def test_parts_in_float32_stay_so(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``A_log`` and norms of linear attention of a Qwen3.5, which are not quantized: loaded, trained on, and merged."""
    source, fp8 = tiny_checkpoint("qwen3_5"), tmp_path / "fp8"
    whole = load_file(source / "model.safetensors")
    small = {name: tensor if is_wide(name) else tensor.to(torch.bfloat16) for name, tensor in whole.items()}
    for name in whole:
        if "language_model.layers" in name and name.endswith("_proj.weight"):
            small[name], small[f"{name}_scale_inv"], _ = quantize(whole[name])
    write(source, fp8, small, quantized=True)
    model = load_model(str(fp8), dtype=torch.bfloat16, attn_implementation="sdpa")
    wide = {name for name in small if is_wide(name)}
    assert {name for name, value in model.named_parameters() if value.dtype == torch.float32} == wide
    assert wide and all(torch.equal(model.get_parameter(name), whole[name]) for name in wide)
    assert any((whole[name].bfloat16() != whole[name]).any() for name in wide)
    settings = {**LORA, "max_steps": 1, "bf16": True}
    adapter = train(fp8, tmp_path / "adapter", registry, **settings, verify_export=True)
    assert "Verified: a fresh process opened" in caplog.text
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    merged = weights(tmp_path / "merged")
    assert {name for name, tensor in merged.items() if tensor.dtype == torch.float32} == wide
    assert all(torch.equal(merged[name], whole[name]) for name in wide)


def test_the_layer_for_multi_token_prediction_is_merged_dequantized(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As published, projections are in FP8 with scales in bfloat16, and ``mtp.fc`` and norms are in bfloat16."""
    source, fp8, merged = tiny_checkpoint("qwen3_5"), tmp_path / "fp8", tmp_path / "merged"
    small, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(source / "model.safetensors").items():
        small[name] = wanted[name] = tensor.to(torch.bfloat16)
        if name.endswith("_proj.weight") and ("language_model.layers" in name or name.startswith("mtp.")):
            small[name], small[f"{name}_scale_inv"], dequantized = quantize(tensor, torch.bfloat16)
            wanted[name] = dequantized.to(torch.bfloat16)
    wanted = {name: tensor for name, tensor in wanted.items() if name.startswith("mtp.")}
    write(source, fp8, small, quantized=True)
    adapter = train(fp8, tmp_path / "adapter", registry, **{**LORA, "max_steps": 1, "bf16": True})
    assert merge_main(["--adapter", str(adapter), "--output", str(merged)]) == 0
    assert "Saved bit for bit as in the checkpoint, not trained: 8 tensors (mtp.*)." in caplog.text
    assert "Saved dequantized (scale x weight), not trained: 7 tensors (mtp.*)." in caplog.text
    found = {name: tensor for name, tensor in weights(merged).items() if name.startswith("mtp.")}
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], wanted[name]) for name in wanted)
    placed = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    assert placed == {name: file.name for file in merged.glob("*.safetensors") for name in load_file(file)}
    assert json.loads((merged / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 1
    model = load_model(str(merged), dtype=torch.bfloat16, attn_implementation="sdpa")
    add_mtp(model, str(merged), torch.bfloat16)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in wanted.items())


def test_a_layer_for_multi_token_prediction_without_scales_is_left_out(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = load_file(tiny_checkpoint("qwen3_5") / "model.safetensors")
    name = "mtp.layers.0.mlp.down_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"], _ = quantize(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    headers = read_headers([tmp_path / "model.safetensors"])
    model = load_model(str(tiny_checkpoint("qwen3_5")), dtype=torch.float32, attn_implementation="sdpa", on_meta=True)
    assert carried_tensors(headers, model).keys() == {key for key in tensors if key.startswith("mtp.")}
    del headers[f"{name}_scale_inv"]
    assert not carried_tensors(headers, model)


def is_wide(name: str) -> bool:
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def test_both_are_asked(made: Made, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    adapter = train(made[0], tmp_path / "adapter", registry, **{**LORA, "max_steps": 1})
    capsys.readouterr()
    for arguments in ([made[0]], [made[1]], [adapter], [adapter, "--base", made[1]]):
        asked = ["--model_name_or_path", *map(str, arguments), "--prompt", "Hi", "--device", "cpu"]
        assert predict.main([*asked, "--max_new_tokens", "4"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[2] == answers[3]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, ", which cannot be trained themselves. Train adapters on them, dequantized, by --lora_enable True"),
        ({**LORA, "deepspeed": "configs/zero2.json"}, "that does not go with --deepspeed. Leave it out"),
        ({**LORA, "fsdp": True, "fsdp_config": "configs/fsdp2.json"}, "that does not go with --fsdp. Leave it out"),
    ],
    ids=["full", "deepspeed", "fsdp"],
)
def test_what_cannot_be_trained_is_refused_in_the_dry_run_too(
    made: Made,
    settings: dict[str, object],
    reason: str,
    registry: Path,
    tmp_path: Path,
    fail: Callable[[list[str]], str],
) -> None:
    for dry in (False, True):
        assert reason in fail(flags(made[0], tmp_path / "out", registry, **settings, dry_run=dry))


def test_the_dry_run_says_what_training_does(
    made: Made, registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(made[0], tmp_path / "out", registry, **LORA, dry_run=True)
    assert "FP8 weights, dequantized: " in caplog.text and "Dry run; nothing was trained." in caplog.text


def test_scales_of_broken_blocks_are_refused(made: Made, tmp_path: Path) -> None:
    """24 rows in blocks of 16 have two scales a column, which transformers takes for blocks of 12 rows."""
    shutil.copytree(made[0], tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [BLOCK + 8, BLOCK]
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"_scale_inv has \[\d+, \d+\] scales for a weight of \[\d+, \d+\], which"):
        load_model(str(tmp_path / "fp8"), dtype=torch.float32, attn_implementation="sdpa")
