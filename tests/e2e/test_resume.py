"""A run that was stopped and resumed ends with the weights of the run that was not."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.train.checkpoint import manifest
from qwenvl.train.checkpoint.folder import find_checkpoint
from qwenvl.train.train_qwen import main
from tests.e2e.runs import equal_bits, flags, history, largest_difference, train

# The 11 samples are 11 batches: 6 optimizer steps an epoch with accumulation 2, 3 with accumulation 4.
STOPS: dict[str, dict[str, Any]] = {
    "inside the first epoch": {"gradient_accumulation_steps": 2, "save_steps": 3, "max_steps": 8},
    "at an epoch's end": {"gradient_accumulation_steps": 4, "save_steps": 3, "max_steps": 6},
    "inside the second epoch": {"gradient_accumulation_steps": 4, "save_steps": 4, "max_steps": 8},
}
MERGER_ONLY = {"tune_mm_vision": False, "tune_mm_llm": False}
CASES = [
    ("qwen2_vl", "inside the first epoch", {"data_flatten": True}),
    ("qwen2_5_vl", "at an epoch's end", {"data_flatten": True}),
    ("qwen3_vl", "inside the first epoch", {"dataloader_num_workers": 2}),
    ("qwen3_vl", "inside the second epoch", {"data_flatten": True, "dataloader_num_workers": 2}),
    ("qwen3_vl", "at an epoch's end", MERGER_ONLY),
    ("qwen3_vl", "inside the first epoch", {"logging_steps": 2}),  # saved between two lines of the log
    ("qwen3_vl", "inside the first epoch", {"data_packing": True, "model_max_length": 128}),
    (
        "qwen3_vl",
        "inside the second epoch",
        {"data_packing": True, "model_max_length": 96, "gradient_accumulation_steps": 2, "save_steps": 5},
    ),
    ("qwen3_vl", "at an epoch's end", {"group_by_cost": True}),
    ("qwen3_vl_moe", "inside the second epoch", {}),
    ("qwen3_5", "inside the first epoch", {}),
    ("qwen3_5_moe", "at an epoch's end", {}),
]


@pytest.mark.parametrize(("family", "stop", "extra"), CASES, ids=lambda value: str(value).replace(" ", "_")[:60])
def test_resumed_run_ends_bitwise_like_the_run_that_was_never_stopped(
    family: str,
    stop: str,
    extra: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {
        "per_device_train_batch_size": 1,
        "save_strategy": "steps",
        "lr_scheduler_type": "linear",  # the schedule goes on as well
        "warmup_steps": 2,
        **STOPS[stop],
        **extra,
    }
    full = train(tiny_checkpoint(family), tmp_path / "full", registry, **settings)
    name = f"checkpoint-{settings['save_steps']}"
    assert not equal_bits(full / name, full), "nothing happened after the checkpoint"
    shutil.copytree(full / name, tmp_path / "resumed" / name)
    caplog.clear()
    resumed = train(tiny_checkpoint(family), tmp_path / "resumed", registry, **settings)
    assert f"resumes from  {tmp_path / 'resumed' / name}\n" in caplog.text
    assert history(resumed) == history(full)  # the same samples in the same steps
    assert equal_bits(resumed, full)


@pytest.fixture(scope="module")
def stopped(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with a checkpoint after each second one; copy it before use."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    return train(tiny_checkpoint("qwen3_vl"), folder, registry, **FOUR_STEPS)


FOUR_STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dataset_use": "text"}


def _again(stopped: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, **extra: Any) -> Path:
    folder = tmp_path / "again"
    if not folder.exists():
        shutil.copytree(stopped, folder)
    return train(tiny_checkpoint("qwen3_vl"), folder, registry, **{**FOUR_STEPS, **extra})


@pytest.mark.parametrize("case", ["stopped", "mixed"])  # at the end of an epoch, and inside one
def test_finished_run_started_again_leaves_the_weights_as_they_are(
    case: str, request: pytest.FixtureRequest, tmp_path: Path, tiny_checkpoint: Callable[[str], Path], registry: Path
) -> None:
    finished = request.getfixturevalue(case)
    shutil.copytree(finished, tmp_path / "again")
    settings = FOUR_STEPS if case == "stopped" else MIXED_STEPS
    again = train(tiny_checkpoint("qwen3_vl"), tmp_path / "again", registry, **settings)
    assert equal_bits(again, finished)
    assert history(again) == history(finished)


def test_false_starts_anew(
    stopped: Path,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"resume_from_checkpoint": "false", "learning_rate": 1e-4, "save_strategy": "no"}
    again = _again(stopped, tmp_path, tiny_checkpoint, registry, **settings)
    assert "resumes from" not in caplog.text
    assert len(history(again)) == 4 and history(again)[0] == history(stopped)[0]
    assert history(again)[-1] != history(stopped)[-1]


def test_incomplete_checkpoint_is_passed_over_with_a_warning(
    stopped: Path,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(stopped / "checkpoint-2", folder / "checkpoint-2")
    broken = folder / "checkpoint-4"
    shutil.copytree(stopped / "checkpoint-4", broken)
    (broken / "trainer_state.json").write_text('{"global_')  # the machine went down while it was written
    (folder / "checkpoint-notes").mkdir()
    again = _again(stopped, tmp_path, tiny_checkpoint, registry)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any(str(broken) in message and "not complete" in message for message in warnings)
    assert f"resumes from  {folder / 'checkpoint-2'}\n" in caplog.text
    assert equal_bits(again, stopped)


def test_checkpoint_can_be_named(
    stopped: Path,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"resume_from_checkpoint": stopped / "checkpoint-2", "output_dir": tmp_path / "elsewhere"}
    again = train(tiny_checkpoint("qwen3_vl"), tmp_path / "unused", registry, **{**FOUR_STEPS, **settings})
    del again
    assert f"resumes from  {stopped / 'checkpoint-2'}\n" in caplog.text
    assert equal_bits(tmp_path / "elsewhere", stopped)


@pytest.mark.parametrize(("wanted", "message"), [("true", "holds no complete checkpoint"), ("missing", "no complete")])
def test_missing_checkpoint_is_an_error(
    wanted: str,
    message: str,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {**FOUR_STEPS, "resume_from_checkpoint": wanted}
    assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **settings)) == 1
    assert message in caplog.text


@pytest.mark.parametrize("named", [False, True])
def test_checkpoint_without_optimizer_is_refused(
    named: bool,
    stopped: Path,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The Trainer of transformers goes on with a new optimizer and a new warm-up, without a word."""
    folder = tmp_path / "again"
    shutil.copytree(stopped / "checkpoint-2", folder / "checkpoint-2")
    (folder / "checkpoint-2" / "optimizer.pt").unlink()  # as with --save_only_model
    manifest.write(folder / "checkpoint-2")
    settings = {**FOUR_STEPS, "resume_from_checkpoint": folder / "checkpoint-2" if named else None}
    assert main(flags(tiny_checkpoint("qwen3_vl"), folder, registry, **settings)) == 1
    assert "holds no state of the optimizer" in caplog.text


def test_weights_of_another_model_are_refused(
    stopped: Path,
    tmp_path: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The Trainer of transformers goes on with whatever did not fit."""
    folder = tmp_path / "again"
    shutil.copytree(stopped / "checkpoint-2", folder / "checkpoint-2")
    config = json.loads((folder / "checkpoint-2" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "checkpoint-2" / "config.json").write_text(json.dumps(config))
    manifest.write(folder / "checkpoint-2")
    assert main(flags(tiny_checkpoint("qwen3_vl"), folder, registry, **FOUR_STEPS)) == 1
    assert "missing in the files" in caplog.text


MIXED_STEPS = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "group_by_cost": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 5,
    "optim": "sgd",
    "learning_rate": 0.05,
}


@pytest.fixture(scope="module")
def mixed(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over two epochs of three steps, with checkpoints inside the first and the second."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    return train(tiny_checkpoint("qwen3_vl"), folder, registry, **MIXED_STEPS)


def test_run_goes_on_with_other_workers_and_another_split_of_its_steps(
    mixed: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """The samples of a step depend on batch size x ranks x accumulation alone, and on no number of workers."""
    state = json.loads((mixed / "checkpoint-4" / "sampler_state.json").read_text())
    assert (state["epoch"], state["position"], state["order"]["indices"]) == (1, 4, 11)
    settings = {
        **MIXED_STEPS,
        "resume_from_checkpoint": mixed / "checkpoint-2",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 3,
    }
    again = train(tiny_checkpoint("qwen3_vl"), tmp_path / "again", registry, **settings)
    assert history(again) == pytest.approx(history(mixed), rel=1e-5)
    assert largest_difference(again, mixed) < 1e-5


OTHER_ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "step": ({"gradient_accumulation_steps": 2}, "--per_device_train_batch_size 1 --gradient_accumulation_steps 4;"),
    "seed": ({"data_seed": 7}, "--data_seed, or --seed without it (42, now 7)"),
    "rows": ({"dataset_use": "mixed%200"}, "samples or packs in an epoch (11, now 22)"),
    "held out": ({"eval_ratio": 0.1}, "which of their rows are used"),
    "costs": ({"max_pixels": "32*64"}, "what samples cost"),
    "packs": ({"data_packing": True}, "how rows are packed"),
}


@pytest.mark.parametrize("case", OTHER_ORDERS)
def test_checkpoint_inside_another_order_is_refused(
    case: str,
    mixed: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The Trainer of transformers skips as many batches as were trained, of whatever order there is now."""
    changes, message = OTHER_ORDERS[case]
    settings = {**MIXED_STEPS, "resume_from_checkpoint": mixed / "checkpoint-2", **changes}
    assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **settings)) == 1
    assert message in caplog.text
    assert "--ignore_data_skip" in caplog.text


def test_checkpoint_is_refused_once_its_data_have_changed(
    mixed: Path,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(registry.parent, tmp_path / "data")
    (tmp_path / "data" / "registry.py").write_text(
        registry.read_text().replace(str(registry.parent), str(tmp_path / "data"))
    )
    settings = {**MIXED_STEPS, "resume_from_checkpoint": mixed / "checkpoint-2"}
    again = train(tiny_checkpoint("qwen3_vl"), tmp_path / "same", tmp_path / "data" / "registry.py", **settings)
    assert equal_bits(again, mixed)  # the same files in another place
    annotations = tmp_path / "data" / "mixed.json"
    annotations.write_text(json.dumps(list(reversed(json.loads(annotations.read_text())))))
    settings |= {"dataset_registry": tmp_path / "data" / "registry.py"}
    assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **settings)) == 1
    assert "the datasets, their content" in caplog.text
    restarted = train(tiny_checkpoint("qwen3_vl"), tmp_path / "restarted", registry, **settings, ignore_data_skip=True)
    assert len(history(restarted)) == 5


def test_starting_anew_beside_checkpoints_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    assert find_checkpoint(str(tmp_path), "false") is None
    assert "holds checkpoints of an earlier run" in caplog.text
