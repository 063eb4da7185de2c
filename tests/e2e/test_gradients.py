"""A trainable tensor that the loss does not reach ends the run after its first step, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qwenvl.config import parse_arguments
from qwenvl.families import get_family
from qwenvl.train.build.data import open_data
from qwenvl.train.build.model import open_model
from qwenvl.train.checkpointing_trainer import Records
from qwenvl.train.run import build_trainer
from qwenvl.utils.errors import UserError
from tests.e2e.runs import flags


def test_a_tensor_without_a_gradient_is_named(
    tiny_checkpoint: Callable[..., Path], registry: Path, tmp_path: Path
) -> None:
    checkpoint, family = tiny_checkpoint("qwen3_vl"), get_family("qwen3_vl")
    parsed = parse_arguments(flags(checkpoint, tmp_path / "out", registry))
    config = AutoConfig.from_pretrained(checkpoint)
    data = open_data(parsed, family, config)
    model = open_model(parsed, data.processor, config, data.added_tokens)
    model.model.language_model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(3)))
    trainer = build_trainer(parsed, model, data, Records("", {}))
    with pytest.raises(UserError, match=r"1 trainable tensors got no gradient.*language_model\.forgotten"):
        trainer.train()
    assert trainer.state.global_step == 0
