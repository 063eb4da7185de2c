"""Every way to ask for sequence, context or tensor parallelism is answered before anything is looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenvl.config import parse_arguments
from qwenvl.utils.errors import UserError
from tests.config.flags import parsed, recipe, rejected

REASON = "parallelism are not supported"
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}


@pytest.mark.parametrize("kind", ["SP", "CP", "TP"])
def test_the_environment_of_accelerate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "1")
    parsed()
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "2")
    message = rejected()
    assert f"PARALLELISM_CONFIG_{kind}_SIZE=2 in the environment" in message and REASON in message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sequence_parallel_size": 2}, "sequence_parallel_size 2"),
        ({"tensor_parallel": {"autotp_size": 4}}, "tensor_parallel.autotp_size 4"),
    ],
)
def test_a_deepspeed_file(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3 | settings))
    message = rejected("--deepspeed", str(tmp_path / "ds.json"))
    assert f"{named} in the file of --deepspeed" in message and REASON in message


@pytest.mark.parametrize("name", ["parallelism_config", "sequence_parallel_size", "sp_size", "cp_size", "tp_size"])
def test_flags_that_other_trainers_have(name: str, tmp_path: Path) -> None:
    message = rejected(f"--{name.replace('_', '-')}", "2")
    assert message.startswith(f"unknown flag --{name}.") and REASON in message
    with pytest.raises(UserError, match=REASON) as caught:
        parse_arguments([recipe(tmp_path, **{name: 2})])
    assert f"{name} is not a setting." in str(caught.value)
    assert "Did you mean" in rejected("--learning_rat", "2")
