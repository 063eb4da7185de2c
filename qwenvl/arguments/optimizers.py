"""Which optimizers of transformers can train here, known before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from transformers.training_args import OptimizerNames

from qwenvl.utilities.errors import UserError

if TYPE_CHECKING:
    from qwenvl.arguments.training import TrainingArguments

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
"""Module that an optimizer needs, and how to get it. Those that are not named come with torch and transformers."""

_OWN_GROUPS = ("galore_", "apollo_", "lomo", "adalomo")
_TENSOR_RATES = ("adamw_torch_4bit", "adamw_torch_8bit")
_ALTERNATIVE = "For less memory: --optim adamw_8bit, paged_adamw_8bit (bitsandbytes) or adafactor."


def check_optimizer(training: TrainingArguments) -> None:
    """Check that the optimizer can be used.

    Raises:
        UserError: its package is missing, or it does not go with how parameters are grouped and saved here.
    """
    name = OptimizerNames(training.optim).value
    if name.startswith(_OWN_GROUPS):
        raise UserError(
            f"--optim {name} is not supported: it divides the parameters into groups of its own, or updates them "
            f"during the backward pass, so that the learning rates of the parts would be lost. {_ALTERNATIVE}"
        )
    if name.startswith("schedule_free_"):
        raise UserError(
            f"--optim {name} is not supported: the weights that it trains on are not those to save, and would have to "
            f"be exchanged around every checkpoint and evaluation. {_ALTERNATIVE}"
        )
    if name in _TENSOR_RATES:
        raise UserError(
            f"--optim {name} is not supported: torchao's optimizers keep each learning rate in a tensor, and end the "
            f"run when it is set to 0 for a step without pictures. {_ALTERNATIVE}"
        )
    if training.optim_target_modules is not None:
        raise UserError("--optim_target_modules is for GaLore and APOLLO, which are not supported. Leave it out.")
    module, command = _MODULES.get(name, ("torch", ""))
    if find_spec(module) is None:
        raise UserError(f"--optim {name} needs the package {module}, which is missing: {command}. {_ALTERNATIVE}")
