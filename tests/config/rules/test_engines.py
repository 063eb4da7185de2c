"""Settings of DeepSpeed and FSDP that contradict the flags, found before the checkpoint is looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl.config.rules.engines import offloading_backend, overlap_problem
from tests.config.flags import parsed, rejected

pytest.importorskip("deepspeed")
_ONCE = '{"cpu_ram_efficient_loading": true}'
ZERO2 = {"zero_optimization": {"stage": 2}}
CONFLICTS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "micro batch": ({"train_micro_batch_size_per_gpu": 4}, [], "4 in the file, 8 by --per_device_train_batch_size"),
    "batch": ({"train_batch_size": 7}, [], "7 in the file, 8 by --per_device_train_batch_size 8 x"),
    "accumulation": ({"gradient_accumulation_steps": 2}, [], "2 in the file, 1 by --gradient_accumulation_steps"),
    "clipping": ({"gradient_clipping": 0.5}, [], "gradient_clipping: 0.5 in the file, 1.0 by --max_grad_norm"),
    "bf16": ({"bf16": {"enabled": True}}, [], "bf16.enabled: true in the file, false by --bf16"),
    "no bf16": ({"bf16": {"enabled": False}}, ["--bf16"], "bf16.enabled: false in the file, true by --bf16"),
    "fp16": ({"fp16": {"enabled": True}}, [], "fp16.enabled: true in the file, false by --fp16"),
    "rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        [],
        "0.001 in the file, 5e-05 by --learning_rate",
    ),
    "betas": (
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}},
        [],
        "[0.9, 0.95] in the file, [0.9, 0.999] by --adam_beta1 and --adam_beta2",
    ),
    "optimizer": (
        {"optimizer": {"type": "Lamb"}},
        ["--optim", "adamw_torch"],
        'optimizer.type: "Lamb" in the file, "adamw_torch" by --optim',
    ),
    "other optimizer": ({"optimizer": {"type": "AdamW"}}, ["--optim", "sgd"], '"AdamW" in the file, "sgd" by --optim'),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, [], '"WarmupLR" in the file, "linear" by --lr_scheduler_type'),
    "warm-up": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 9}}},
        ["--warmup_steps", "5"],
        "9 in the file, 5",
    ),
    "sums of stage 1": (
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        [],
        "data_types.grad_accum_dtype: fp32 with stage 1",
    ),
    "no stage": ({"zero_optimization": {}}, [], "zero_optimization: there is no stage"),
    "no weights": ({"zero_optimization": {"stage": 3}}, [], "stage3_gather_16bit_weights_on_model_save: must be true"),
}


def written(folder: Path, settings: Any) -> str:
    file = folder / "ds.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return str(file)


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_conflict_is_named_with_both_values(case: str, tmp_path: Path) -> None:
    settings, flags, message = CONFLICTS[case]
    file = written(tmp_path, {**ZERO2, **settings})
    assert message in rejected("--deepspeed", file, *flags)


def test_all_conflicts_come_in_one_message_that_says_what_to_do(tmp_path: Path) -> None:
    file = written(tmp_path, {"gradient_clipping": 0.5, "train_batch_size": 3, "bf16": {"enabled": True}})
    message = rejected("--deepspeed", file)
    assert all(name in message for name in ("gradient_clipping", "train_batch_size", "bf16", "zero_optimization"))
    assert file in message and '"auto"' in message


def test_the_ranks_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    file = written(tmp_path, {**ZERO2, "train_batch_size": 8})
    assert "8 in the file, 32 by" in rejected("--deepspeed", file)


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_recipes_fit_every_flag(name: str) -> None:
    for flags in ([], ["--bf16"], ["--learning_rate", "1e-3", "--max_grad_norm", "0.3", "--optim", "sgd"]):
        parsed("--deepspeed", f"configs/{name}.json", *flags)


def test_sections_that_say_what_the_flags_say_are_left_to_the_flags(tmp_path: Path) -> None:
    """DeepSpeed's own optimizer would have one learning rate for all parts of the model."""
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8, "weight_decay": "auto"}}
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "total_num_steps": "auto"}}
    file = written(tmp_path, {**ZERO2, "optimizer": optimizer, "scheduler": scheduler})
    training = parsed("--deepspeed", file, "--mm_projector_lr", "1e-4").training
    assert training.deepspeed == ZERO2
    assert not {"optimizer", "scheduler"} & training.hf_deepspeed_config.config.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n"b" 2}', "ds.json, line 3: not valid JSON"),
        ("[1]", "found a list"),
        ("", "line 1: not valid JSON"),
    ],
)
def test_a_broken_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in rejected("--deepspeed", written(tmp_path, text))
    assert message in rejected("--fsdp", "--fsdp_config", written(tmp_path, text))


def test_overlapped_communication_is_refused_where_it_corrupts_gradients() -> None:
    for stage in (1, 2):
        overlapping = {"stage": stage, "overlap_comm": True}
        for version in ("0.18.9", "0.9.5", "0.18.0+cu128"):
            message = overlap_problem(overlapping, version)
            assert message is not None and "corrupts gradients" in message and version in message
        for version in ("0.19.0", "0.19.8", "1.0.0", ""):
            assert overlap_problem(overlapping, version) is None
        assert overlap_problem({**overlapping, "overlap_comm": False}, "0.18.9") is None
    assert overlap_problem({"stage": 3, "overlap_comm": True}, "0.18.9") is None


def test_overlapped_communication_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, {"zero_optimization": {"stage": 2, "overlap_comm": True}})
    parsed("--deepspeed", file)
    monkeypatch.setattr("qwenvl.config.rules.engines.metadata.version", lambda name: "0.18.4")
    assert "corrupts gradients in DeepSpeed 0.18.4" in rejected("--deepspeed", file)


def test_the_fsdp_recipe_is_taken() -> None:
    training = parsed("--fsdp", "True", "--fsdp_config", "configs/fsdp2.json").training
    assert training.fsdp_plugin_args["fsdp_version"] == 2
    assert training.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "--deepspeed", "configs/zero2.json"], "both shard the model"),
        (["--fsdp_config", "configs/fsdp2.json"], "no effect without --fsdp True"),
        (["--fsdp", "--fsdp_config", _ONCE, "--train_mtp"], "--train_mtp True with cpu_ram_efficient_loading"),
        (
            ["--fsdp", "--fsdp_config", _ONCE, "--additional_tokens", "<a>"],
            "--additional_tokens with cpu_ram_efficient",
        ),
        (["--fsdp", "--fsdp_config", '{"version": 1}'], "only 2 is supported"),
        (["--fsdp", "--fsdp_config", '{"fsdp_version": 2, "wrap_policy": 1}'], "Did you mean 'auto_wrap_policy'?"),
        (["--fsdp", "--fsdp_config", '{"state_dict_type": "LOCAL"}'], "'LOCAL' in --fsdp_config is not one of FULL"),
        (
            ["--fsdp", "--gradient_checkpointing", "--fsdp_config", '{"activation_checkpointing": true}'],
            "keep one, or it is done twice",
        ),
        (["--fsdp", "--use_cpu", "--fsdp_config", '{"cpu_offload": true}'], "in host memory anyway. Write false."),
    ],
)
def test_fsdp_flags_that_cannot_work_are_named(flags: list[str], message: str) -> None:
    assert message in rejected(*flags)


def test_fsdp_on_the_cpu_of_a_machine_with_an_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert "--use_cpu True: FSDP2 shards on the accelerator" in rejected("--fsdp", "--use_cpu")


@pytest.mark.parametrize(
    ("flags", "offloads", "backend"),
    [
        (["--fsdp", "--fsdp_config", '{"cpu_offload": false}'], True, "cuda:nccl,cpu:gloo"),
        (["--fsdp", "--fsdp_config", "configs/fsdp2.json"], False, None),
        ([], True, None),
    ],
)
def test_norms_of_offloaded_gradients_can_be_summed(flags: list[str], offloads: bool, backend: str | None) -> None:
    """NCCL does not sum numbers in host memory. Parsed for a CPU, and then looked at as on a machine with GPUs."""
    training = parsed(*flags).training
    assert training.ddp_backend is None
    training.use_cpu = False
    training.fsdp_config = {"cpu_offload": offloads}
    assert offloading_backend(training) == backend
