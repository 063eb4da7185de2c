"""Numbers out of range: one message each, through the command line, before anything is loaded."""

from __future__ import annotations

import pytest

from qwenvl.config import ParsedArguments
from qwenvl.config.parsing.parser import all_settings
from qwenvl.config.rules.hf_arguments import REFUSED
from qwenvl.config.rules.limits import LIMITS, Limits
from qwenvl.utils.errors import UserError
from tests.config.flags import parsed, rejected

NUMBERS = {name: setting for name, setting in all_settings().items() if setting.kinds & {int, float}}
OF_TRAINING = [name for name, setting in NUMBERS.items() if "Training" in setting.owner.__name__]

BESIDE: dict[str, tuple[str, ...]] = {
    "rope_factor": ("--rope_scaling", "yarn"),
    "rope_native_length": ("--rope_scaling", "yarn", "--rope_factor", "2"),
    "quantization_bit": ("--lora_enable", "True", "--tune_mm_llm", "False"),
    "min_pixels": ("--max_pixels", "2**62"),
    "video_min_frames": ("--video_max_frames", "2**62"),
    "video_min_pixels": ("--video_max_pixels", "2**62"),
    "eval_generate": ("--eval_strategy", "steps", "--eval_ratio", "0.1"),
    "eval_steps": ("--eval_strategy", "steps", "--eval_ratio", "0.1"),
    "dataloader_prefetch_factor": ("--dataloader_num_workers", "1"),
}
"""Flags that a number needs to be taken at all."""

TAKES_ZERO = {
    *(
        "eval_ratio",
        "lora_dropout",
        "lora_expert_r",
        "quantization_bit",
        "base_interval",
        "hidden_layer",
        "focal_gamma",
        "warmup_ratio",
    ),
    *("dry_run_devices", "router_aux_loss_coef", "step_timeout", "profile_steps", "dataloader_num_workers", "seed"),
    *("eval_generate", "learning_rate", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "eval_delay", "data_seed", "local_rank"),
}
TAKES_MINUS_ONE = {"max_steps", "hidden_layer", "local_rank", "base_interval"}


def outcome(name: str, value: str) -> ParsedArguments | str:
    """Return what a value of a flag is parsed into, or the message; anything else fails the test."""
    try:
        return parsed(f"--{name}={value}", *BESIDE.get(name, ()))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "many", "", "1e400", "[1]", "{}", "true", "1 2"])
def test_what_is_no_number_is_refused(name: str, value: str) -> None:
    message = outcome(name, value)
    assert isinstance(message, str) and message.startswith(f"--{name}: "), message


@pytest.mark.parametrize("name", NUMBERS)
def test_zero(name: str) -> None:
    found = outcome(name, "0")
    assert isinstance(found, ParsedArguments) == (name in TAKES_ZERO), found
    assert name in TAKES_ZERO or name in str(found)


@pytest.mark.parametrize("name", NUMBERS)
def test_minus_one(name: str) -> None:
    found = outcome(name, "-1")
    assert isinstance(found, ParsedArguments) == (name in TAKES_MINUS_ONE), found
    assert name in TAKES_MINUS_ONE or name in str(found)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["2**62", "-2**62"])
def test_huge_numbers_are_taken_or_refused_in_one_message(name: str, value: str) -> None:
    found = outcome(name, value)
    assert isinstance(found, ParsedArguments) or name in found


@pytest.mark.parametrize("name", [name for name, setting in NUMBERS.items() if float not in setting.kinds])
def test_whole_numbers_are_whole(name: str) -> None:
    assert "whole number" in str(outcome(name, "1.5"))


def test_every_number_of_training_has_limits() -> None:
    assert set(OF_TRAINING) == LIMITS.keys()


@pytest.mark.parametrize("name", LIMITS)
def test_the_ends_of_a_range(name: str) -> None:
    limits = LIMITS[name]
    step = 1 if float not in NUMBERS[name].kinds else 1e-3
    assert f"--{name} " in str(outcome(name, str(limits.low - step)))
    if limits.above:
        assert f"must be {limits}" in str(outcome(name, str(limits.low)))
    if limits.high is not None and name not in REFUSED:
        beyond = limits.high if limits.below else limits.high + max(step, limits.high * 1e-9)
        assert f"must be {limits}" in str(
            outcome(name, repr(int(beyond) if float not in NUMBERS[name].kinds else beyond))
        )
        if not limits.below:
            assert isinstance(outcome(name, repr(limits.high)), ParsedArguments)


def test_words_of_limits() -> None:
    assert str(Limits(0, above=True)) == "above 0"
    assert str(Limits(1, 2**31 - 1)) == "1 or more and at most 2147483647"
    assert str(Limits(0, 1, below=True)) == "0 or more and below 1"
    assert Limits(0).allow(None)


def test_a_run_that_would_train_nothing_is_refused() -> None:
    for epochs in ("0", "-1"):
        message = rejected("--num_train_epochs", epochs)
        assert f"--num_train_epochs {epochs} must be above 0" in message and "--dry_run" in message
        parsed("--num_train_epochs", epochs, "--max_steps", "5")  # which comes first
    assert "trains nothing" in rejected("--max_steps", "0")
    assert "--max_steps -5 must be -1 or more" in rejected("--max_steps", "-5")
