"""Check before anything is loaded that an optimizer of transformers can be used here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from importlib.util import find_spec

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from qwenvl.config.training import TrainingArguments
from qwenvl.utils.errors import UserError

_BITSANDBYTES = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "ademamix"),
    *("ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
)
_MODULES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_BITSANDBYTES, ("bitsandbytes", "pip install bitsandbytes")),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
    "adamw_anyprecision": ("torchdistx", "pip install torchdistx"),
    "adamw_torch_xla": ("torch_xla", "pip install torch_xla (a TPU)"),
    "adamw_torch_npu_fused": ("torch_npu", "pip install torch_npu (an Ascend NPU)"),
}
"""Module that an optimizer needs, and how to install it. All others come with torch and transformers."""

_OPTIONS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "optim_args": None}
"""Options that not every optimizer has, and their defaults."""

_OWN_GROUPS = ("galore_", "apollo_", "lomo", "adalomo")
_TENSOR_RATES = ("adamw_torch_4bit", "adamw_torch_8bit")
_ALTERNATIVE = "For less memory: --optim adamw_8bit, paged_adamw_8bit (bitsandbytes) or adafactor."


def check_optimizer(training: TrainingArguments) -> None:
    """Check that the optimizer can be used.

    Raises:
        UserError: its package is missing, or it does not support how parameters are grouped and saved here.
    """
    name = OptimizerNames(training.optim).value
    if name.startswith(_OWN_GROUPS):
        raise UserError(
            f"--optim {name} is not supported: it divides the parameters into groups of its own, or updates them "
            f"during the backward pass, so that the learning rates of the parts would be lost. {_ALTERNATIVE}"
        )
    if name.startswith("schedule_free_"):
        raise UserError(
            f"--optim {name} is not supported: it trains on other weights than it saves, which would have to be "
            f"exchanged around every checkpoint and evaluation. {_ALTERNATIVE}"
        )
    if name in _TENSOR_RATES:
        raise UserError(
            f"--optim {name} is not supported: torchao's optimizers keep each learning rate in a tensor, and end the "
            f"run when it is set to 0 for a step without images. {_ALTERNATIVE}"
        )
    module, command = _MODULES.get(name, ("torch", ""))
    if find_spec(module) is None:
        raise UserError(f"--optim {name} needs the package {module}, which is missing: {command}. {_ALTERNATIVE}")
    _check_options(training, name)


def _check_options(training: TrainingArguments, name: str) -> None:
    """Try the given options on the optimizer: transformers silently drops the options that it does not know."""
    changed = [option for option, default in _OPTIONS.items() if getattr(training, option) != default]
    if not changed:
        return
    from transformers import Trainer  # slow to import, and only needed here

    options = ", ".join(f"--{option} {getattr(training, option)}" for option in changed)
    try:
        chosen, found = Trainer.get_optimizer_cls_and_kwargs(training)
        chosen([nn.Parameter(torch.zeros(1))], **found)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--optim {name} with {options}: {error}. Correct the options.") from error
    for flag, other in _without_each(training, changed):
        if Trainer.get_optimizer_cls_and_kwargs(other)[1] == found:
            raise UserError(f"{flag} changes nothing with --optim {name}. Leave it out.")
        if flag.startswith("--optim_args weight_decay="):
            raise UserError(f"{flag}: --weight_decay, which knows biases and norms, is the flag for it.")


def _without_each(training: TrainingArguments, changed: Sequence[str]) -> Iterator[tuple[str, TrainingArguments]]:
    """Yield each option that was set, and the arguments without it."""
    for option in changed:
        value = getattr(training, option)
        pairs = value.replace(" ", "").split(",") if option == "optim_args" else [value]
        for pair in pairs:
            rest = [one for one in pairs if one != pair]
            other = copy(training)
            setattr(other, option, ",".join(rest) or None if option == "optim_args" else _OPTIONS[option])
            yield f"--{option} {pair}", other
