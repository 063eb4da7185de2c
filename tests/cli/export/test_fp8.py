"""FP8 files: which weights are quantized, and what the config and the index say of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl.cli.export.fp8 import write_fp8
from qwenvl.utils.errors import UserError

LAYER = "model.language_model.layers.0"
SHAPES = {
    "model.language_model.embed_tokens.weight": (256, 128),
    f"{LAYER}.self_attn.q_proj.weight": (256, 128),
    f"{LAYER}.self_attn.k_proj.weight": (64, 128),  # half a block, and servers compute q, k and v as one layer
    f"{LAYER}.self_attn.v_proj.weight": (128, 128),
    f"{LAYER}.self_attn.o_proj.weight": (128, 256),
    f"{LAYER}.self_attn.o_proj.bias": (128,),
    f"{LAYER}.mlp.gate_proj.weight": (128, 128),
    f"{LAYER}.mlp.up_proj.weight": (128, 128),
    f"{LAYER}.linear_attn.conv1d.weight": (128, 128, 4),
    "model.visual.blocks.0.attn.proj.weight": (128, 128),
    "mtp.layers.0.mlp.up_proj.weight": (128, 128),
    "lm_head.weight": (256, 128),
}
QUANTIZED = {f"{LAYER}.{name}.weight" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")}


def make(folder: Path, older: bool = False) -> None:
    """Write a folder of two files; ``older`` has the names of Qwen2-VL's files."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    if older:
        tensors = {name.replace(".language_model", "").replace("model.v", "v"): one for name, one in tensors.items()}
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[:6], names[6:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl" if older else "qwen3_vl", "kept": 1}))


@pytest.mark.parametrize("older", [False, True])
def test_whole_layers_are_quantized_and_the_rest_is_named(older: bool, tmp_path: Path) -> None:
    make(tmp_path / "model", older)
    (tmp_path / "fp8").mkdir()
    assert write_fp8(tmp_path / "model", tmp_path / "fp8") == 3
    record = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    index = record["weight_map"]
    found, whole = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for file in sorted(set(index.values())):
        part = load_file(tmp_path / "fp8" / file)
        assert {name for name, place in index.items() if place == file} == set(part)
        found |= part
        whole |= load_file(tmp_path / "model" / file)
    assert record["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    quantized = {name.replace(".language_model", "") if older else name for name in QUANTIZED}
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn} == quantized
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items() if name not in quantized)
    name = next(name for name in quantized if "o_proj" in name)
    assert found[f"{name}_scale_inv"].shape == (1, 2)
    assert found[f"{name}_scale_inv"][0, 1] == pytest.approx(float(whole[name][:, 128:].abs().max()) / 448, rel=1e-5)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    kept = {"lm_head", "mtp.layers.0.mlp.up_proj", f"{'' if older else 'model.'}visual.blocks.0.attn.proj"}
    layer = LAYER.replace(".language_model", "") if older else LAYER
    kept |= {f"{layer}.self_attn.{one}_proj" for one in "qkv"} | {f"{layer}.linear_attn.conv1d"}
    assert set(config["quantization_config"]["modules_to_not_convert"]) == kept
    assert config["kept"] == 1 and config["quantization_config"]["weight_block_size"] == [128, 128]


def test_a_folder_without_whole_blocks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({f"{LAYER}.mlp.up_proj.weight": torch.zeros(64, 64)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(UserError, match="multiples of 128"):
        write_fp8(tmp_path / "model", tmp_path)
