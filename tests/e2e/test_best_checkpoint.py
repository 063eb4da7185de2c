"""The best checkpoint is loaded at the end, also where it is the one that was saved last."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import LORA, REPOSITORY, equal_bits, flags, history, run_on_two_ranks, train

EVERY_STEP: dict[str, Any] = {
    "eval_dataset_use": "held_out",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 3,
}
BEST = {**EVERY_STEP, "load_best_model_at_end": True}
CASES: dict[str, dict[str, Any]] = {
    "each step": BEST,
    "best alone": {**BEST, "save_strategy": "best"},
    "one kept": {**EVERY_STEP, "metric_for_best_model": "loss", "save_total_limit": 1},
    "adapters": {**BEST, **LORA, "learning_rate": 1e-2},
    "adapters, best alone": {**BEST, **LORA, "learning_rate": 1e-2, "save_strategy": "best"},
}


def require_last_is_best(folder: Path) -> None:
    """Check that a run of three steps, of which the last was the best, says so and ended with its weights."""
    losses = history(folder, "eval_loss")
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses) == 3
    assert best_of(folder / "checkpoint-3") == best_of(folder) == str(folder / "checkpoint-3")
    assert equal_bits(folder, folder / "checkpoint-3")
    assert not (folder / ".saving").exists()


def best_of(folder: Path) -> str | None:
    """Return what a folder's trainer_state.json names as the best checkpoint."""
    return json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]


@pytest.mark.parametrize("case", CASES)
def test_last_checkpoint_may_be_the_best(
    case: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    settings = CASES[case]
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    require_last_is_best(folder)
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert kept == ({"checkpoint-3"} if case == "one kept" else {"checkpoint-1", "checkpoint-2", "checkpoint-3"})


def test_finished_run_in_another_place_finds_its_best_checkpoint(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """The best one is not the last here, and its recorded path is gone."""
    settings = {**BEST, "metric_for_best_model": "loss", "greater_is_better": True}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    assert best_of(folder / "checkpoint-3") == str(folder / "checkpoint-1")
    moved = folder.rename(tmp_path / "moved")
    train(tiny_checkpoint("qwen3_vl"), moved, registry, **settings)
    assert best_of(moved) == str(moved / "checkpoint-1")
    assert equal_bits(moved, moved / "checkpoint-1") and not equal_bits(moved, moved / "checkpoint-3")


ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO-2": {"deepspeed": REPOSITORY / "configs" / "zero2.json"},
    "FSDP2": {"fsdp": True, "fsdp_config": "configs/fsdp2.json"},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_last_checkpoint_may_be_the_best_on_two_ranks(
    engine: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    kinds: dict[str, dict[str, Any]] = {"whole": {}, "adapters": {**LORA, "learning_rate": 1e-2}}
    commands = {
        name: flags(
            tiny_checkpoint("qwen3_vl"), tmp_path / name, registry, **BEST, **ENGINES[engine], **kind, ddp_timeout=600
        )
        for name, kind in kinds.items()
    }
    for folder in run_on_two_ranks(tmp_path, commands, engine).values():
        require_last_is_best(folder)
