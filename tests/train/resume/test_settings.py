"""Settings that differ are compared as they work; what a checkpoint fixes is refused, and the rest is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenvl.config import all_settings
from qwenvl.train.checkpoint.folder import require_state_dict
from qwenvl.train.resume.hyperparameters import STATEFUL_SCHEDULES
from qwenvl.train.resume.settings import compare_settings
from qwenvl.train.train_qwen import main
from qwenvl.utils.errors import UserError
from tests.e2e.runs import equal_bits, flags, train


def _saved(folder: Path, **settings: Any) -> str:
    (folder / "training_args.yaml").write_text(yaml.safe_dump(settings))
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    (folder / "serving.json").write_text("{}")
    return str(folder)


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    ({"max_steps": 4, "num_train_epochs": 2.0}, {"max_steps": 4}),
    ({"lora_enable": True, "lora_target": "vision, language"}, {"lora_enable": True, "lora_target": "language,vision"}),
    ({"lora_enable": True, "lora_alpha": 128}, {"lora_enable": True}),
    ({"lora_r": 8}, {}),  # without adapters
    ({"metric_for_best_model": "loss", "load_best_model_at_end": True}, {"load_best_model_at_end": True}),
    ({"chat_template_kwargs": {}}, {}),
    ({"a_flag_of_older_times": 3}, {}),
]


@pytest.mark.parametrize(("before", "now"), SAME)
def test_two_names_of_one_thing_are_no_change(before: dict[str, Any], now: dict[str, Any], tmp_path: Path) -> None:
    assert compare_settings(_saved(tmp_path, **before), now) == []
    known = all_settings()
    assert compare_settings(_saved(tmp_path, **now), {name: before[name] for name in before if name in known}) == []


@pytest.mark.parametrize("schedule", STATEFUL_SCHEDULES)
def test_rates_of_a_schedule_that_follows_the_run_are_refused(schedule: str, tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path, lr_scheduler_type=schedule, learning_rate=1e-3, weight_decay=0.1)
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 -> 0\.01"):
        compare_settings(checkpoint, {"lr_scheduler_type": schedule, "learning_rate": 1e-2})
    (change,) = compare_settings(checkpoint, {"lr_scheduler_type": schedule, "learning_rate": 1e-3})
    assert change.name == "weight_decay"


def test_checkpoint_of_the_time_before_exact_contexts_says_that_they_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = _saved(tmp_path, learning_rate=1e-3)
    (tmp_path / "serving.json").unlink()
    assert [str(change) for change in compare_settings(checkpoint, {"learning_rate": 1e-3})] == [
        "history: as_rendered -> exact"
    ]
    assert "history: as_rendered -> exact from step 3 on." in caplog.text
    assert compare_settings(checkpoint, {"learning_rate": 1e-3, "history": "as_rendered"}) == []


def test_checkpoint_without_a_record_of_settings_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert compare_settings(str(tmp_path), {"optim": "sgd"}) == []
    assert "its settings cannot be compared" in caplog.text


def test_damaged_record_of_settings_is_named(tmp_path: Path) -> None:
    for text in ("a: [", "- a", "max_steps: x"):
        (tmp_path / "training_args.yaml").write_text(text)
        with pytest.raises(UserError, match=r"training_args\.yaml cannot be read"):
            compare_settings(str(tmp_path), {})


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_other_files_of_fsdp_are_refused(kind: str, tmp_path: Path) -> None:
    other = {"FULL_STATE_DICT": "SHARDED_STATE_DICT", "SHARDED_STATE_DICT": "FULL_STATE_DICT"}[kind]
    if kind == "FULL_STATE_DICT":
        (tmp_path / "optimizer.bin").write_bytes(b"")
    require_state_dict(str(tmp_path), kind)
    with pytest.raises(UserError, match=f"state_dict_type {kind}, and --fsdp_config has {other}"):
        require_state_dict(str(tmp_path), other)


TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "another head": ({"head": "mlp"}, "head: linear in the checkpoint, mlp in this run"),
    "another layer": ({"hidden_layer": 1}, "hidden_layer: -1 in the checkpoint, 1 in this run"),
    "no task": ({"task": None, "dataset_use": "mixed"}, "task: classification in the checkpoint, None in this run"),
    "another loss": ({"task_loss": "focal", "head_lr": 1e-4}, ""),
}


@pytest.mark.parametrize("case", TASKS)
def test_module_of_a_task_has_to_stay_and_its_loss_may_change(
    case: str,
    labelled: Callable[[str], Path],
    registry: Path,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes, says = TASKS[case]
    data = labelled("classification")
    common: dict[str, Any] = {"task": "classification", "dataset_use": "samples", "save_steps": 1, "max_steps": 2}
    common |= {"save_strategy": "steps", "report_to": "none"}
    earlier = train(tiny_checkpoint("qwen3_vl"), tmp_path / "earlier", data, **common)
    settings = {**common, "resume_from_checkpoint": earlier / "checkpoint-1", "ignore_data_skip": True, **changes}
    read = registry if "dataset_use" in changes else data
    code = main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", read, **settings))
    assert code == (1 if says else 0)
    assert says in caplog.text
    if not says:
        assert "task_loss: not set -> focal from step 2 on." in caplog.text
        assert not equal_bits(tmp_path / "run", earlier)
