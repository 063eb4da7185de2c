from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl.config import arguments_to_yaml, parse_arguments
from qwenvl.config.parsing.parser import all_settings
from qwenvl.utils.errors import UserError
from tests.config.flags import NEEDED, parsed, recipe, rejected


def test_every_official_flag_has_its_meaning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = parse_arguments(
        "--model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --tune_mm_llm True --tune_mm_vision False --tune_mm_mlp True "
        "--dataset_use a%100,b --output_dir ./checkpoints --cache_dir ./cache --bf16 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 4 --learning_rate 2e-7 --mm_projector_lr 1e-5 --vision_tower_lr 1e-6 "
        "--optim adamw_torch --model_max_length 4096 --data_flatten True --data_packing True --base_interval 2 "
        r"--max_pixels 576\*28\*28 --min_pixels 16\*28\*28 --video_fps 2 --video_max_frames 8 --video_min_frames 4 "
        r"--video_max_pixels 1664\*28\*28 --video_min_pixels 256\*28\*28 --video_max_frame_pixels 768*28*28 "
        "--video_min_frame_pixels 128*28*28 --num_train_epochs 3 --warmup_ratio 0.03 --lr_scheduler_type cosine "
        "--weight_decay 0.01 --logging_steps 10 --save_steps 500 --save_total_limit 3 --lora_enable False --lora_r 8 "
        "--lora_alpha 16 --lora_dropout 0.0 --max_grad_norm 1 --eval_strategy no --gradient_checkpointing True".split()
    )
    assert (result.model.tune_mm_llm, result.model.tune_mm_mlp, result.model.tune_mm_vision) == (True, True, False)
    assert (result.data.max_pixels, result.data.video_max_pixels) == (576 * 28 * 28, 1664 * 28 * 28)
    assert (result.data.video_max_frame_pixels, result.data.video_fps) == (768 * 28 * 28, 2)
    assert (result.training.mm_projector_lr, result.training.vision_tower_lr) == (1e-5, 1e-6)
    assert (result.adapters.lora_r, result.adapters.lora_alpha, result.adapters.lora_dropout) == (8, 16, 0.0)
    assert result.training.gradient_checkpointing is True
    assert result.training.bf16 is True
    assert not (tmp_path / "checkpoints").exists()


def test_defaults_are_the_official_ones_where_they_reached_training() -> None:
    result = parsed()
    assert (result.model.tune_mm_mlp, result.model.tune_mm_vision) == (False, False)
    assert (result.data.max_pixels, result.data.min_pixels) == (28 * 28 * 576, 28 * 28 * 16)
    assert (result.data.video_max_frames, result.data.video_min_frames, result.data.video_fps) == (8, 4, 2.0)
    assert (result.data.video_max_pixels, result.data.video_min_pixels) == (1024 * 28 * 28, 256 * 28 * 28)
    assert result.training.model_max_length == 8192
    assert result.training.optim == "adamw_torch"
    assert result.training.remove_unused_columns is False
    assert result.training.prediction_loss_only is True
    assert result.training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert result.training.ddp_find_unused_parameters is False
    assert result.debug is False


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    file = recipe(tmp_path, learning_rate="1e-5", seed=7, dataset_use=["a%50", "b"], bf16=False)
    result = parse_arguments([file, *NEEDED[:2], *NEEDED[4:], "--learning_rate", "3e-6", "--bf16"])
    assert (result.training.learning_rate, result.training.seed) == (3e-6, 7)
    assert result.data.dataset_use == "a%50,b"
    assert result.training.bf16 is True


def test_types_of_a_recipe(tmp_path: Path) -> None:
    text = """
    learning_rate: 1e-5
    max_pixels: 576*32*32
    min_pixels: 1e3
    eval_strategy: no
    max_steps: 1.0e+1
    run_name: 2024
    bf16: "True"
    gradient-checkpointing: 1
    seed: null
    lr_scheduler_kwargs: {min_lr: 1.0e-6}
    lr_scheduler_type: cosine_with_min_lr
    chat_template_kwargs: {enable_thinking: false}
    report_to: none
    label_names: [labels]
    """
    file = tmp_path / "a.yaml"
    file.write_text(text)
    result = parse_arguments([str(file), *NEEDED])
    assert (result.training.learning_rate, result.training.max_steps, result.training.seed) == (1e-5, 10, 42)
    assert (result.data.max_pixels, result.data.min_pixels) == (576 * 32 * 32, 1000)
    assert (result.training.eval_strategy, result.training.run_name, result.training.bf16) == ("no", "2024", True)
    assert result.training.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert result.data.chat_template_kwargs == {"enable_thinking": False}
    assert result.training.report_to == []
    assert result.training.label_names == ["labels"]
    assert result.training.gradient_checkpointing is True
    assert "seed" not in result.given


def test_a_null_takes_a_value_of_the_recipe_away(tmp_path: Path) -> None:
    assert parse_arguments([recipe(tmp_path, seed=7), *NEEDED, "--seed", "null"]).training.seed == 42


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "'learning_rate'"]),
        (["--learning_rat", "1"], ["--learning_rat", "'learning_rate'"]),  # no abbreviations
        (["--max_pixels", "many"], ["--max_pixels", "'many'", "whole number"]),
        (["--seed", "1.5"], ["--seed", "'1.5'", "whole number"]),
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "expected a number"]),
        (["--bf16", "maybe"], ["--bf16", "'maybe'", "true or false"]),
        (["--learning_rate"], ["--learning_rate", "expected one argument"]),
        (["--overlength", "truncate"], ["--overlength", "'truncate_turns'"]),
        (["--lr_scheduler_type", "cosin"], ["--lr_scheduler_type", "'cosine'"]),
        (["--optim", "adamw"], ["--optim", "adamw_torch"]),
        (["--log_level", "loud"], ["--log_level", "warning"]),
        (["--chat_template_kwargs", "{a}"], ["--chat_template_kwargs", "JSON"]),
        (["--chat_template_kwargs", "a"], ["--chat_template_kwargs", "a mapping"]),
        (["recipe.yaml"], ["'recipe.yaml'"]),
        (["--report_to", "tensorbord"], ["'tensorbord'", "'tensorboard'"]),
        (["--deepspeed", "nowhere.json"], ["--deepspeed", "nowhere.json", "not a file"]),
        (["--min_pixels", "1000", "--max_pixels", "999"], ["--min_pixels 1000", "--max_pixels 999"]),
        (["--video_min_pixels", "9", "--video_max_pixels", "8"], ["--video_min_pixels", "--video_max_pixels"]),
        (["--video_min_frames", "9"], ["--video_min_frames 9", "--video_max_frames 8"]),
        (["--video_max_frame_pixels", "3", "--video_min_frame_pixels", "4"], ["--video_min_frame_pixels 4"]),
        (["--video_fps", "0"], ["--video_fps", "above 0"]),
        (["--max_pixels", "-1"], ["--max_pixels", "above 0"]),
        (["--max_steps", "0"], ["--max_steps", "--dry_run"]),
        (["--eval_ratio", "1"], ["--eval_ratio", "share"]),
        (["--eval_ratio", "-0.1"], ["--eval_ratio", "share"]),
        (["--eval_ratio", "0.1", "--eval_dataset_use", "b"], ["--eval_ratio", "--eval_dataset_use"]),
        (["--eval_strategy", "steps"], ["--eval_dataset_use", "--eval_ratio"]),
        (["--eval_on_start"], ["--eval_dataset_use", "--eval_ratio"]),
        (["--warmup_ratio", "0.1", "--warmup_steps", "5"], ["--warmup_ratio", "--warmup_steps"]),
        (["--warmup_ratio", "1.5"], ["--warmup_ratio", "below 1"]),
        (["--lora_enable"], ["--tune_mm_llm True", "--lora_target language"]),
        (["--lora_dropout", "1"], ["--lora_dropout"]),
        (["--model_max_length", "1"], ["--model_max_length"]),
        (["--vision_tower_lr", "0"], ["--vision_tower_lr", "above 0"]),
        (["--use_cpu", "--fp16"], ["--fp16", "--bf16"]),
        (["--tune_mm_llm", "False"], ["--tune_mm_llm", "--tune_mm_vision"]),
        (["--model_name_or_path", ""], ["--model_name_or_path"]),
        (["--dataset_use", " "], ["--dataset_use"]),
        (["--output_dir", "null"], ["--output_dir"]),
        (["--logging_steps", "0"], ["logging"]),
        (["--fsdp_config", "nowhere.json"], ["--fsdp_config", "nowhere.json"]),
    ],
)
def test_one_clear_error(flags: list[str], words: list[str]) -> None:
    message = rejected(*flags)
    assert all(word in message for word in words), message
    assert "usage:" not in message


def test_errors_of_a_recipe_name_the_file(tmp_path: Path) -> None:
    for values, word in (({"lerning_rate": 1}, "'learning_rate'"), ({"seed": [1]}, "whole number"), ({"bf16": 3}, "3")):
        with pytest.raises(UserError, match="recipe") as caught:
            parse_arguments([recipe(tmp_path, **values), *NEEDED])
        assert "recipe.yaml" in str(caught.value)
        assert word in str(caught.value)
        assert next(iter(values)) in str(caught.value)
    with pytest.raises(UserError, match="given twice"):
        parse_arguments([recipe(tmp_path, **{"max_steps": 1, "max-steps": 2}), *NEEDED])


def test_settings_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(tmp_path)
    result = parse_arguments([recipe(tmp_path, deepspeed="configs/zero3.json"), *NEEDED])
    assert Path(result.training.deepspeed).is_file()
    assert result.given["deepspeed"] == "configs/zero3.json"


def test_packs_are_flattened() -> None:
    assert parsed("--data_packing").data.data_flatten is True


def test_settings_without_effect_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qwenvl"):
        parsed("--mm_projector_lr", "1e-5", "--vision_tower_lr", "1e-5", "--base_interval", "3", "--eval_ratio", "0.1")
    for words in ("mm_projector_lr has no effect", "vision_tower_lr has no effect", "base_interval", "nothing is eval"):
        assert sum(words in message for message in caplog.messages) == 1
    caplog.clear()
    parsed("--mm_projector_lr", "1e-5", "--tune_mm_mlp")
    assert "mm_projector_lr" not in caplog.text


def test_every_setting_can_be_given() -> None:
    from dataclasses import fields

    from qwenvl.config import DataArguments, ModelArguments, TrainingArguments

    names = {field.name for owner in (ModelArguments, DataArguments, TrainingArguments) for field in fields(owner)}
    assert names - set(all_settings()) <= {"parallelism_config"}  # an object, from Python only


def test_the_written_recipe_reruns_the_job(tmp_path: Path) -> None:
    first = parsed(
        *("--warmup_ratio", "0.03", "--hub_token", "hf_secret", "--max_pixels", "64*28*28", "--learning_rate", "1e-5"),
        *("--eval_strategy", "no", "--report_to", "none", "--chat_template_kwargs", '{"a": [1, "ä"]}', "--debug"),
        *("--lr_scheduler_type", "cosine", "--dataset_use", "a%50,b", "--run_name", "1e5"),
    )
    text = arguments_to_yaml(first)
    assert "hf_secret" not in text
    assert "hub_token" not in text
    file = tmp_path / "training_args.yaml"
    file.write_text(text)
    second = parse_arguments([str(file), "--hub_token", "hf_secret"])
    assert (second.model, second.data) == (first.model, first.data)
    assert second.training.to_dict() == first.training.to_dict()


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "learning_rate": st.floats(1e-12, 1.0),
            "run_name": st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1).filter(
                lambda text: text != "null"
            ),
            "data_flatten": st.booleans(),
            "chat_template_kwargs": st.dictionaries(st.text("abc", min_size=1), st.integers() | st.booleans()),
            "save_strategy": st.sampled_from(["no", "steps", "epoch"]),
        }
    )
)
def test_any_recipe_survives_being_written(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    first = parse_arguments([recipe(folder, **values), *NEEDED])
    assert {name: first.given[name] for name in values} == values
    (folder / "again.yaml").write_text(arguments_to_yaml(first))
    assert parse_arguments([str(folder / "again.yaml")]).given == first.given
