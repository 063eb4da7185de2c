"""Base class of modules that a task trains on top of the language model, such as classifiers.

The module is a submodule of the model, because DDP, ZeRO-3 and FSDP manage parameters while the model's ``forward``
runs. :func:`qwenvl.models.forward.install` attaches it and calls it after the language model. Its output replaces the
logits, and the vocabulary projection does not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NAME = "task_head"
"""Attribute of the model that holds the module, and prefix of its parameters' names."""


class Readout(nn.Module):
    """Reads hidden states, attention or whatever else it watches, and returns one tensor.

    Subclasses set ``record`` and implement ``forward``. Parameters must be the same on every rank: draw them from a
    generator of their own. For a batch without any unit, return a tensor of zero rows that is still connected to every
    parameter, so that each rank takes part in each collective.

    Attributes:
        record: Entry in ``task.json``, JSON values: everything that is needed to build the module again.
        learning_rate: Learning rate of its parameters; None for the run's.
    """

    record: Mapping[str, Any]
    learning_rate: float | None = None

    def watch(self, language_model: nn.Module) -> Sequence[RemovableHandle]:
        """Register hooks on layers of the language model, if its last hidden states are not enough; by default none.

        Hooks must be bound methods, so that a copy of the model has hooks of its own. With gradient checkpointing they
        run again in the backward pass. :meth:`forward` must release the tensors that they keep.
        """
        del language_model
        return ()

    def start(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare for one call of the language model.

        Args:
            inputs: Entry ``readout_inputs`` of the batch, see :class:`qwenvl.tasks.objective.Objective`.

        Returns:
            Further arguments of the language model, such as ``output_hidden_states``.
        """
        del inputs
        return {}

    def unused(self, language_model: nn.Module) -> Sequence[nn.Module]:
        """Return layers of the language model that get no gradient, as the output ignores them; by default none."""
        del language_model
        return ()

    def forward(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the tensor from which the objective computes its loss and metrics.

        Args:
            output: Output of the language model, with ``last_hidden_state`` [B, T, H].
            inputs: Entry ``readout_inputs`` of the batch.
        """
        raise NotImplementedError


def readout_of(model: Any) -> Readout | None:
    """Return the module of a model's task; None for plain language modelling."""
    found: Readout | None = getattr(model, NAME, None)
    return found


def is_readout(name: str) -> bool:
    """Whether a parameter of this name belongs to a task's module."""
    return name.startswith(f"{NAME}.")


def attach(model: Any, readout: Readout) -> None:
    """Make a readout a submodule of a model, on its device; ``save_pretrained`` leaves it out of the model's files."""
    device = next(model.parameters()).device
    add_unsaved(model, NAME, readout.to(device) if device.type != "meta" else readout.to_empty(device=device))


def add_unsaved(model: Any, name: str, module: nn.Module) -> None:
    """Add a submodule that ``save_pretrained`` leaves out of the model's files."""
    model.add_module(name, module)
    ignored = {f"{name}.{part}" for part in module.state_dict()}
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *ignored}


def draw_normal(parameter: Tensor, deviation: float, seed: int) -> None:
    """Fill a parameter with normal numbers that depend on the seed alone, not on earlier draws or the device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
