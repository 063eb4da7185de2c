"""Everything that is saved may be read by whom the umask lets read it, whichever library wrote it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli.connector_lab.build import ConnectorSettings, build_lab
from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.cli.make_tiny_checkpoint.parts import build_part
from qwenvl.cli.merge_lora import main as merge_lora
from tests.e2e.labelled import FROZEN
from tests.e2e.labelled import SETTINGS as LABELLED
from tests.e2e.runs import LORA, REPOSITORY, flags, run_on_two_ranks, train

CHECKPOINTS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of this process and of those that it starts."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def require_umask(folder: Path, umask: int, *names: str) -> None:
    """Check the permissions of everything below a folder, in which there have to be files of these names."""
    paths = [folder, *folder.rglob("*")]
    assert set(names) <= {path.name for path in paths}
    kinds = {path: 0o777 if path.is_dir() else 0o666 for path in paths}  # DeepSpeed saves scripts, which may be run
    modes = {path: stat.S_IMODE(path.stat().st_mode) & kind for path, kind in kinds.items()}
    other = {str(path): f"{modes[path]:o}" for path, kind in kinds.items() if modes[path] != kind & ~umask}
    assert not other


def test_a_run_and_its_caches(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, umask: int
) -> None:
    settings = {**CHECKPOINTS, "data_cache_dir": tmp_path / "cache", "data_packing": True, "save_dtype": "bfloat16"}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    require_umask(folder, umask, "checkpoint-1", "model.safetensors", "optimizer.pt", "rng_state.pth")
    require_umask(tmp_path / "cache", umask)


def test_adapters_and_what_they_are_merged_into(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, umask: int
) -> None:
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **CHECKPOINTS, **LORA, lora_dropout=0.0)
    require_umask(folder, umask, "checkpoint-1", "adapter_model.safetensors")
    assert merge_lora(["--adapter", str(folder), "--output", str(tmp_path / "merged")]) == 0
    require_umask(tmp_path / "merged", umask, "model.safetensors")


def test_heads(
    tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path, umask: int
) -> None:
    settings: dict[str, Any] = {**LABELLED, **FROZEN, **CHECKPOINTS, "task": "classification"}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", labelled("classification"), **settings)
    require_umask(folder, umask, "checkpoint-1", "task_head.safetensors")


def test_checkpoints_that_tools_make(tmp_path: Path, umask: int) -> None:
    build_tiny_checkpoint("qwen2_vl", tmp_path / "tiny")
    for part in ("clip", "qwen3"):
        build_part(part, tmp_path / part)
    build_lab(str(tmp_path / "clip"), str(tmp_path / "qwen3"), ConnectorSettings("mlp"), tmp_path / "lab")
    for name in ("tiny", "clip", "qwen3", "lab"):
        require_umask(tmp_path / name, umask, "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
@pytest.mark.parametrize("umask", [0o027], indirect=True, ids=oct)
def test_runs_of_two_ranks(
    engine: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, umask: int
) -> None:
    pytest.importorskip("deepspeed")
    zero3 = json.loads((REPOSITORY / "configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or a tiny model is never sharded
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    engines: dict[str, dict[str, Any]] = {
        "FSDP2": {"fsdp": True, "fsdp_config": '{"state_dict_type": "SHARDED_STATE_DICT"}'},
        "ZeRO-3": {"deepspeed": tmp_path / "zero3.json"},
    }
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / engine, registry, **CHECKPOINTS, **engines[engine])
    (folder,) = run_on_two_ranks(tmp_path, {engine: command}, engine).values()
    require_umask(folder, umask, "checkpoint-1", "model.safetensors")
