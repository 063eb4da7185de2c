"""Every field of transformers' arguments works, is refused with the reason, is warned of, or cannot matter."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers

from qwenvl.config.parsing.parser import all_settings
from qwenvl.config.rules.hf_arguments import REFUSED, WARNED, fates
from tests.config.flags import parsed, rejected

PAGE = Path(__file__).resolve().parents[3] / "docs" / "training_arguments.md"
EVALUATING = ("--eval_strategy", "steps", "--eval_ratio", "0.1")


def test_every_field_of_transformers_is_decided_on() -> None:
    """What a newer version adds must be looked at: does anything here read it, and as it says?"""
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert fields - fates().keys() == set(), "decide on these in qwenvl/config/rules/hf_arguments.py"


def test_fields_of_no_version_are_not_in_the_table() -> None:
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than 5.22
    assert fates().keys() - fields <= newer


def test_the_page_shows_the_table() -> None:
    rows = [f"| `{name}` | {part} | {note} |" for name, (part, note) in fates().items()]
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert shown == rows, "\n".join(rows)


OTHER_VALUES: dict[str, str] = {
    "label_smoothing_factor": "0.1",
    "optim_target_modules": "all-linear",
    "prediction_loss_only": "False",
    "eval_do_concat_batches": "False",
    "eval_use_gather_object": "True",
    "eval_accumulation_steps": "4",
    "include_for_metrics": "inputs",
    "batch_eval_metrics": "True",
    "label_names": "targets",
    "remove_unused_columns": "True",
    "use_cache": "True",
    "liger_kernel_config": '{"rope": true}',
    "enable_jit_checkpoint": "True",
    "dataloader_in_order": "False",
    "do_train": "False",
    "do_predict": "True",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_passed_over_is_refused_with_the_reason(name: str) -> None:
    message = rejected(f"--{name}", OTHER_VALUES[name])
    assert message.startswith(f"--{name} ") and REFUSED[name].reason in message and "Leave it out" in message


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_change_nothing_are_taken(name: str) -> None:
    default = all_settings()[name].default
    assert REFUSED[name].harmless or default is None
    for value in REFUSED[name].harmless:
        text = [json.dumps(value)] if not isinstance(value, list) else value
        if text:
            parsed(f"--{name}", *text)
    if name != "do_train":  # whose default would be to train nothing
        assert default is None or default in REFUSED[name].harmless


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split_batches": True}, "split_batches True would have no effect"),
        ({"dispatch_batches": True}, "dispatch_batches True would have no effect"),
        ({"even_batches": False}, "even_batches False would have no effect"),
        ({"use_seedable_sampler": False}, "use_seedable_sampler False"),
        ({"non_blocking": True}, "non_blocking True"),
        ({"gradient_accumulation_kwargs": {"num_steps": 2}}, "gradient_accumulation_kwargs"),
        ({"use_configured_state": True}, "use_configured_state True"),
        ({"splitbatches": True}, "Did you mean 'split_batches'"),
    ],
)
def test_settings_of_accelerate_that_shape_batches_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in rejected("--accelerator_config", json.dumps(settings))
    file = tmp_path / "accelerator.json"
    file.write_text(json.dumps(settings))
    assert words in rejected("--accelerator_config", str(file))


def test_accelerates_own_defaults_are_taken() -> None:
    parsed("--accelerator_config", '{"split_batches": false, "even_batches": true, "dispatch_batches": null}')


@pytest.mark.parametrize(
    "flags", [("--train_sampling_strategy", "group_by_length"), ("--dataloader_drop_last", "True")]
)
def test_what_has_no_effect_is_said(flags: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert flags[0].removeprefix("--") in WARNED
    with caplog.at_level(logging.WARNING, "qwenvl"):
        parsed(*flags)
    assert f"{flags[0]} has no effect" in caplog.text


def test_evaluation_flags_agree_with_each_other() -> None:
    assert "--eval_strategy" in rejected("--do_eval", "True")
    assert parsed("--do_eval", "True", *EVALUATING).training.do_eval is True
    assert "contradict" in rejected("--do_eval", "False", *EVALUATING)
    parsed("--do_eval", "False")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--neftune_noise_alpha 5 --data_flatten True", "its noise shrinks"),
        ("--neftune_noise_alpha 5 --data_packing True", "its noise shrinks"),
        ("--torch_compile_backend inducter", "Did you mean 'inductor'"),
        ("--torch_compile_mode fast", "not one of default"),
        ("--dataloader_multiprocessing_context thread", "one of fork, spawn"),
    ],
)
def test_what_libraries_would_refuse_late_or_do_otherwise(flags: str, words: str) -> None:
    assert words in rejected(*flags.split())


def test_the_same_flags_with_values_that_work() -> None:
    parsed("--neftune_noise_alpha", "5")
    assert parsed("--torch_compile_mode", "max-autotune").training.torch_compile is True
    parsed("--torch_compile_backend", "eager")
    parsed("--dataloader_multiprocessing_context", "spawn")


@pytest.mark.parametrize("taken", ["add_generation_prompt", "tokenize", "tools", "messages"])
def test_arguments_of_the_template_that_the_trainer_gives(taken: str) -> None:
    message = rejected("--chat_template_kwargs", json.dumps({taken: True}))
    assert f"{taken} is set by the trainer" in message
