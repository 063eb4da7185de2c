"""Settings of other trainers and older versions are refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenvl.config import parse_arguments
from qwenvl.config.data import DataArguments
from qwenvl.config.lora import AdapterArguments
from qwenvl.config.model import ModelArguments
from qwenvl.config.parsing.fields import settings_of
from qwenvl.config.parsing.unknown_names import ADVICE, RENAMED
from qwenvl.config.tasks import TaskArguments
from qwenvl.config.training import TrainingArguments
from qwenvl.utils.errors import UserError


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_arguments(arguments)
    return str(caught.value)


def test_advice_is_about_names_that_do_not_exist_and_names_those_that_do() -> None:
    known = settings_of(ModelArguments, AdapterArguments, TaskArguments, DataArguments, TrainingArguments).keys()
    assert not known & (RENAMED.keys() | ADVICE.keys())
    assert set(RENAMED.values()) <= known


def test_a_recipe_of_another_trainer_is_refused_with_all_of_its_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "lf.yaml"
    recipe.write_text("stage: sft\nfinetuning_type: lora\ndataset: t\ncutoff_len: 2048\nlearning_rate: 1e-4\n")
    message = refusal(str(recipe))
    assert message.startswith(f"recipe {recipe}: stage is not a setting. This trainer does supervised fine-tuning")
    assert "finetuning_type is not a setting. Here lora_enable trains adapters" in message
    assert "dataset is not a setting. It is 'dataset_use' here." in message
    assert "cutoff_len is not a setting. It is 'model_max_length' here." in message
    assert "lora_target" not in message and "learning_rate" not in message


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--evaluation_strategy", "It is 'eval_strategy' here."),
        ("--lora-rank", "It is 'lora_r' here."),
        ("--overwrite_output_dir", "for a new one, name another output_dir."),
        ("--learning_rat", "Did you mean 'learning_rate'"),
        ("--zzz", "unknown flag --zzz. --help lists all flags."),
    ],
)
def test_flags_that_do_not_exist(flag: str, advice: str) -> None:
    assert advice in refusal(flag, "1")
