"""What our training arguments make of transformers': warmup, evaluation, checkpointing, devices."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from qwenvl.config.parsing.parser import all_settings
from tests.config.flags import parsed, rejected


def test_the_warmup_ratio_reaches_the_schedule() -> None:
    assert parsed("--warmup_ratio", "0.03").training.get_warmup_steps(1000) == 30
    assert parsed("--warmup_ratio", "0").training.get_warmup_steps(1000) == 0
    assert parsed("--warmup_steps", "7").training.get_warmup_steps(1000) == 7


def test_evaluation_follows_saving_not_logging() -> None:
    evaluating = ("--eval_strategy", "steps", "--eval_ratio", "0.1", "--logging_steps", "1")
    assert parsed(*evaluating, "--save_steps", "200").training.eval_steps == 200
    assert parsed(*evaluating, "--eval_steps", "30").training.eval_steps == 30


@pytest.mark.filterwarnings("error::FutureWarning")
def test_gradient_checkpointing_under_both_names() -> None:
    for flags in (["--gradient_checkpointing", "True"], ["--gradient_checkpointing"]):
        training = parsed(*flags).training
        assert training.gradient_checkpointing is True
        assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not parsed().training.gradient_checkpointing
    if "activation_checkpointing" in all_settings():
        assert parsed("--activation_checkpointing").training.gradient_checkpointing is True
        assert "contradict" in rejected("--activation_checkpointing", "--gradient_checkpointing", "False")


@pytest.mark.parametrize("arguments", ['{"use_reentrant": true}', '{"every_n_layers": 2}'])
def test_arguments_of_checkpointing_that_would_have_no_effect_are_refused(arguments: str) -> None:
    names = {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"} & all_settings().keys()
    for name in names:
        assert "Leave the flag out" in rejected(f"--{name}", arguments)
        parsed(f"--{name}", '{"use_reentrant": false}')


def test_one_process_uses_one_device() -> None:
    training = parsed().training
    assert training.n_gpu <= 1
    training._n_gpu = 4  # what transformers finds on a machine with four
    training._keep_to_one_device()
    assert training.train_batch_size == training.per_device_train_batch_size


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_without_an_accelerator_the_cpu_is_used() -> None:
    assert parsed().training.use_cpu is True
    assert parsed("--bf16").training.bf16 is True


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_reporter_whose_package_is_missing_is_refused(name: str) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    assert f"pip install {name}" in rejected("--report_to", name)


@pytest.mark.parametrize("flag", ["--device_peak_tflops 0", "--device_peak_tflops -1", "--profile_steps -1"])
def test_instruments_take_no_impossible_values(flag: str) -> None:
    assert flag.split()[0] in rejected(*flag.split())
    assert parsed("--device_peak_tflops", "989.5", "--profile_steps", "3").training.device_peak_tflops == 989.5


def test_activations_are_offloaded_with_checkpointing_only() -> None:
    assert "without --gradient_checkpointing would copy" in rejected("--activation_offload")
    assert parsed("--activation_offload", "--gradient_checkpointing").training.activation_offload
    if hasattr(parsed().training, "activation_checkpointing"):  # transformers 5.20 and newer
        assert parsed("--activation_offload", "--activation_checkpointing").training.activation_offload


def test_a_hang_is_reported_before_collectives_time_out() -> None:
    assert parsed().training.ddp_timeout == 1800 + 1800
    assert parsed("--step_timeout", "7200").training.ddp_timeout == 7200 + 1800
    assert parsed("--step_timeout", "0").training.ddp_timeout == 7 * 24 * 3600
    assert parsed("--step_timeout", "7200", "--ddp_timeout", "60").training.ddp_timeout == 60
