"""Quantized checkpoints through the front door: one line with the way out, before anything of them loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli import show_sample
from qwenvl.cli.merge_lora import main as merge_main
from qwenvl.cli.predict import command as predict
from tests.e2e.runs import LORA, flags, train

Fail = Callable[[list[str]], str]
QUANTIZED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
}


def quantized(base: Path, folder: Path, method: str) -> Path:
    """Return a copy of a checkpoint that says that it is quantized, without its weights: nothing may look for them."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZED[method]}))
    return folder


@pytest.mark.parametrize("method", sorted({*QUANTIZED} - {"fp8"}))  # see test_fp8_base.py
@pytest.mark.parametrize("settings", [LORA, {"tune_mm_llm": True}, {**LORA, "dry_run": True}], ids=["lora", "", "dry"])
def test_training_refuses_them(
    method: str,
    settings: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    fail: Fail,
) -> None:
    base = quantized(tiny_checkpoint("qwen3_vl"), tmp_path / "base", method)
    settings = {**settings, "dataset_use": "nothing"}  # which is found out later
    message = fail(flags(base, tmp_path / "out", registry, **settings))
    assert f"--model_name_or_path {base}: its weights are quantized ({method}, says quantization_config" in message
    assert "Name the unquantized checkpoint" in message and "--quantization_bit 4" in message


def test_other_tools(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters do not merge into one; asking one takes a GPU; samples are shown with it, which takes no weights."""
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), base)
    adapter = train(base, tmp_path / "adapter", registry, **{**LORA, "max_steps": 1})
    shutil.rmtree(base)
    quantized(tiny_checkpoint("qwen3_vl"), base, "awq")
    capsys.readouterr()
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 1
    assert "its weights are quantized (awq" in capsys.readouterr().err
    assert predict.main(["--model_name_or_path", str(base), "--prompt", "Hi", "--device", "cpu"]) == 2
    assert f"{base}: its weights are quantized (awq), which needs a GPU." in capsys.readouterr().err
    use = ["--dataset_use", "mixed", "--dataset_registry", str(registry)]
    assert show_sample.main(["--model_name_or_path", str(base), *use]) == 0
