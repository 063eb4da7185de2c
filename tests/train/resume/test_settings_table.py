"""The table of changed settings holds every field once, is what docs/resume.md shows, and is what resumed runs do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from qwenvl.config import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    TaskArguments,
    TrainingArguments,
)
from qwenvl.models.lora.files import start_anew
from qwenvl.train.resume.settings_table import TABLE, Row, as_markdown
from tests.e2e.runs import LORA, REPOSITORY, equal_bits, flags, history, largest_difference, train

CLASSES = (ModelArguments, AdapterArguments, TaskArguments, DataArguments, TrainingArguments)
EARLIER: dict[str, Any] = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "linear",
    "eval_dataset_use": "held_out",
    "eval_strategy": "steps",
    "metric_for_best_model": "loss",
    "additional_tokens": "slowly",
}
ADAPTED = {**LORA, "additional_tokens": None}


@dataclasses.dataclass(frozen=True)
class Example:
    """A changed setting of a row of the table.

    Args:
        changes: Settings of the resumed run that differ.
        says: What the run says of them; empty where nothing is to be said.
        earlier: Settings in which the earlier run differs from ``EARLIER``.
        alike: Whether the resumed run ends with the weights of the one that was never changed.
    """

    changes: dict[str, Any]
    says: str = ""
    earlier: dict[str, Any] = dataclasses.field(default_factory=dict)
    alike: bool = False


EXAMPLES: dict[str, Example] = {
    # take effect
    "learning rates": Example({"vision_tower_lr": 1e-4}, "vision_tower_lr: not set -> 0.0001 from step 3 on."),
    "schedule": Example({"warmup_ratio": 0.75}, "warmup_steps: 0 -> 0.75 from step 3 on."),
    "length": Example({"max_steps": 3}, "max_steps: 4 -> 3 from step 3 on."),
    "optimizer's settings": Example({"adam_beta2": 0.9}, "adam_beta2: 0.999 -> 0.9 from step 3 on."),
    "loss and noise": Example({"neftune_noise_alpha": 5}, "neftune_noise_alpha: not set -> 5 from step 3 on."),
    "how samples are presented": Example({"add_vision_id": True}, "add_vision_id: False -> True from step 3 on."),
    "which samples are left out": Example({"model_max_length": 90}, "model_max_length: 2048 -> 90 from step 3 on."),
    "what the best checkpoint is": Example(
        {"greater_is_better": True}, "greater_is_better: False -> True from step 3 on.", alike=True
    ),
    "position in the data": Example({"ignore_data_skip": True}, "the epoch begins again"),
    # refused
    "trained parts": Example({"tune_mm_vision": False}, "tune_mm_vision: True -> False (trained parts"),
    "adapters": Example({"lora_alpha": 800}, "lora_alpha: 8 -> 800 (adapters", ADAPTED),
    "added tokens": Example({"additional_tokens": "moves"}, 'additional_tokens: ["slowly"] -> ["moves"] (added tokens'),
    "optimizer": Example({"optim": "sgd"}, "optim: adamw_torch -> sgd (optimizer"),
    "precision": Example({"bf16": True}, "bf16: False -> True (precision"),
    "seed": Example({"seed": 7}, "seed: 42 -> 7 (seed"),
    # content decides
    "order of the samples": Example({"dataset_use": "mixed%200"}, "stands inside an epoch whose order was made of"),
    "context": Example({"rope_scaling": "yarn", "rope_factor": 2}, "was trained with the native context"),
    # no influence
    "kernels, memory, devices": Example({"attn_implementation": "eager", "gradient_checkpointing": True}, alike=True),
    "loading of data": Example({"dataloader_num_workers": 1}, alike=True),
    "evaluation": Example({"eval_steps": 1, "per_device_eval_batch_size": 1}, alike=True),
    "saving": Example({"save_steps": 1, "save_total_limit": 1}, alike=True),
    "logs": Example({"logging_steps": 2}, alike=True),
    "control of the run": Example({"max_bad_steps": 3}, alike=True),
}
OF_THEIR_OWN = {"starting checkpoint", "task", "engine"}
"""Rows whose checks other tests try: the first two below, engines in test_reshaping.py and test_engines.py."""


@pytest.fixture(scope="module")
def earlier(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], Path]:
    """Return a function that makes a finished run of four steps, once, with a checkpoint after the second."""
    done: dict[str, Path] = {}

    def run(changes: dict[str, Any]) -> Path:
        key = str(changes)
        if key not in done:
            folder = tmp_path_factory.mktemp("earlier") / "run"
            done[key] = train(tiny_checkpoint("qwen3_vl"), folder, registry, **{**EARLIER, **changes})
        return done[key]

    return run


def test_every_field_is_on_the_table_once() -> None:
    names = Counter(name for row in TABLE for name in row.settings)
    assert not [name for name, count in names.items() if count > 1]
    known = {field.name for cls in (*CLASSES, transformers.TrainingArguments) for field in dataclasses.fields(cls)}
    assert known - names.keys() == set(), "say in qwenvl/train/resume/settings_table.py what becomes of these"
    assert len({row.subject for row in TABLE}) == len(TABLE)


def test_documentation_shows_the_table() -> None:
    page = (REPOSITORY / "docs" / "resume.md").read_text(encoding="utf-8")
    assert "\n".join(as_markdown()) in page, (
        "replace it by the lines of qwenvl.train.resume.settings_table.as_markdown()"
    )


def test_every_row_has_an_example() -> None:
    assert EXAMPLES.keys() | OF_THEIR_OWN == {row.subject for row in TABLE}
    for row in TABLE:
        if row.subject in EXAMPLES:
            changed = EXAMPLES[row.subject].changes.keys() & set(row.settings)
            assert changed, row.subject


@pytest.mark.parametrize("row", [row for row in TABLE if row.subject not in OF_THEIR_OWN], ids=lambda row: row.subject)
def test_changed_setting_does_what_the_table_says(
    row: Row,
    earlier: Callable[[dict[str, Any]], Path],
    fail: Callable[[list[str]], str],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    example = EXAMPLES[row.subject]
    unchanged = earlier(example.earlier)
    checkpoint = unchanged / "checkpoint-2"
    settings = {**EARLIER, **example.earlier, "resume_from_checkpoint": checkpoint, **example.changes}
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    if row.outcome in ("refused", "content decides"):
        fail(command)
        assert example.says in caplog.text
        assert start_anew(checkpoint) in caplog.text
        return
    caplog.clear()
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    said = [record.message for record in caplog.records if " from step 3 on." in record.message]
    if row.subject == "position in the data":
        assert not said and example.says in caplog.text
    else:
        assert said == ([example.says] if example.says else [])
    if example.alike:
        assert largest_difference(folder, unchanged) < 1e-5
    else:
        assert not equal_bits(folder, unchanged)


def test_intervals_of_a_resumed_run_are_its_own(
    earlier: Callable[[dict[str, Any]], Path],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
) -> None:
    """The Trainer of transformers goes on with those of the run that saved the checkpoint."""
    settings = {"save_steps": 1, "eval_steps": 1, "logging_steps": 2}
    checkpoint = earlier({}) / "checkpoint-2"
    folder = train(
        tiny_checkpoint("qwen3_vl"),
        tmp_path / "run",
        registry,
        **{**EARLIER, "resume_from_checkpoint": checkpoint, **settings},
    )
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert len(history(folder, "eval_loss")) == 3  # after steps 2, 3 and 4
    assert len(history(folder)) == 3  # of steps 1 and 2; of 3 and 4 together


def test_checkpoint_of_the_same_model_in_another_place(
    earlier: Callable[[dict[str, Any]], Path],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    moved = shutil.copytree(tiny_checkpoint("qwen3_vl"), tmp_path / "moved")
    settings = {**EARLIER, "resume_from_checkpoint": earlier({}) / "checkpoint-2"}
    folder = train(moved, tmp_path / "run", registry, **settings)
    assert f"model_name_or_path: {tiny_checkpoint('qwen3_vl')} -> {moved} from step 3 on." in caplog.text
    assert equal_bits(folder, earlier({}))


def test_other_measure_of_the_best_forgets_the_best_so_far(
    earlier: Callable[[dict[str, Any]], Path], tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """The losses fall: by the new measure the later one is worse, and would never replace the best so far."""
    checkpoint = earlier({}) / "checkpoint-2"
    before = json.loads((checkpoint / "trainer_state.json").read_text())
    assert before["best_global_step"] == 2
    settings = {**EARLIER, "resume_from_checkpoint": checkpoint, "greater_is_better": True}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    after = json.loads((folder / "trainer_state.json").read_text())
    assert after["best_global_step"] == 4 and after["best_metric"] < before["best_metric"]


WITHOUT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "adapters from a whole model": ({}, ADAPTED, "lora_enable: False -> True"),
    "a whole model from adapters": (ADAPTED, {"lora_enable": None, "tune_mm_llm": True}, "lora_enable: True -> False"),
    "rslora": (ADAPTED, {"use_rslora": True}, "use_rslora: False -> True"),
    "dora": (ADAPTED, {"use_dora": True}, "use_dora: False -> True"),
    "rank": (ADAPTED, {"lora_r": 2}, "lora_r: 4 -> 2"),
    "layers": (ADAPTED, {"lora_target": "vision"}, "lora_target: language,experts -> vision"),
    "order of tokens": (
        {"additional_tokens": "slowly"},
        {"additional_tokens": "slowly moves"},
        "additional_tokens",
    ),
    "other schedule": ({}, {"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type: linear -> reduce_lr_on"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_what_a_checkpoint_fixes_is_refused(
    case: str,
    earlier: Callable[[dict[str, Any]], Path],
    fail: Callable[[list[str]], str],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, changes, says = WITHOUT[case]
    checkpoint = earlier(before) / "checkpoint-2"
    settings = {**EARLIER, **before, "resume_from_checkpoint": checkpoint, **changes}
    fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings))
    assert says in caplog.text and start_anew(checkpoint) in caplog.text
    assert ("merge_lora.py" in start_anew(checkpoint)) == bool(before.get("lora_enable"))
