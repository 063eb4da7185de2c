"""Checkpoints with quantized weights, known from their config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli.connector_lab.build import read_part_config
from qwenvl.models.quantization import quantization_method, refuse_quantized
from qwenvl.utils.errors import UserError


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, ""),
        ({"quantization_config": None, "text_config": {"quantization_config": {}}}, ""),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),  # as transformers wrote it before 4.38
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "unknown method"),
        ({"quantization_config": "int4"}, "unknown method"),
    ],
)
def test_the_method(config: dict[str, Any], method: str) -> None:
    assert quantization_method(config) == method
    if not method:
        refuse_quantized(config, "--model_name_or_path x")
        return
    with pytest.raises(UserError, match=rf"^--model_name_or_path x: its weights are quantized \({method}, says"):
        refuse_quantized(config, "--model_name_or_path x")


def test_parts_of_the_lab(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"^language_model {tmp_path}: its weights are quantized \(awq"):
        read_part_config(str(tmp_path), "language_model")
