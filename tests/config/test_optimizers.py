"""Optimizers that cannot be used are refused with what to do, before the checkpoint is looked for."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from transformers.training_args import OptimizerNames

from qwenvl.config.optimizers import _MODULES
from tests.config.flags import parsed, rejected

NEED_NOTHING = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def test_every_optimizer_of_transformers_is_decided_on() -> None:
    """What a newer version adds must be looked at: it may need a package, or groups of its own."""
    refused = ("galore_", "apollo_", "lomo", "adalomo", "schedule_free_", "adamw_torch_4bit", "adamw_torch_8bit")
    names = {name.value for name in OptimizerNames if not name.value.startswith(refused)}
    assert names - set(NEED_NOTHING) == set(_MODULES) & names


@pytest.mark.parametrize("name", NEED_NOTHING)
def test_optimizers_of_torch_and_transformers_are_taken(name: str) -> None:
    assert parsed("--optim", name).training.optim == name


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit", "stable_adamw"])
def test_a_missing_package_is_named_with_its_command(name: str) -> None:
    module, command = _MODULES[name]
    if find_spec(module) is not None:
        parsed("--optim", name)
        return
    message = rejected("--optim", name)
    assert f"--optim {name} needs the package {module}, which is missing: {command}" in message


@pytest.mark.parametrize(
    "name", ["galore_adamw", "apollo_adamw_layerwise", "lomo", "adalomo", "schedule_free_adamw", "adamw_torch_8bit"]
)
def test_optimizers_that_would_ignore_settings_are_refused(name: str) -> None:
    assert f"--optim {name} is not supported" in rejected("--optim", name)
    assert "Leave it out" in rejected("--optim", "adamw_torch", "--optim_target_modules", "all-linear")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--optim adamw_torch --optim_args momentum=0.9",
            "--optim_args momentum=0.9 changes nothing with --optim adamw_",
        ),
        ("--optim sgd --optim_args momentum=0.9,beta1=0.5", "--optim_args beta1=0.5 changes nothing with --optim sgd"),
        ("--optim sgd --optim_args momentum=-1", "momentum"),
        ("--optim sgd --optim_args momentum=fast", "momentum=fast"),
        ("--optim sgd --optim_args momentum", "--optim sgd with --optim_args momentum"),
        ("--optim sgd --optim_args weight_decay=0.1", "--weight_decay"),
        ("--optim sgd --adam_beta1 0.8", "--adam_beta1 0.8 changes nothing with --optim sgd"),
        ("--optim adafactor --adam_epsilon 1e-6", "--adam_epsilon 1e-06 changes nothing with --optim adafactor"),
    ],
)
def test_options_that_an_optimizer_does_not_have(flags: str, words: str) -> None:
    assert words in rejected(*flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--optim adamw_torch --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-6",
        "--optim adamw_torch_fused --adam_beta1 0",
        "--optim sgd --optim_args momentum=0.9,nesterov=true",
        "--optim rmsprop --optim_args alpha=0.9",
    ],
)
def test_options_that_an_optimizer_has(flags: str) -> None:
    parsed(*flags.split())
