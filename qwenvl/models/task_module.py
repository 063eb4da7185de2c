"""The module that a task trains beside a model, at a fixed place in it: what it reads off the language model.

A part of the model and no function beside it, because DDP, ZeRO-3 and FSDP see to the parameters of a model while its
``forward`` runs. :func:`qwenvl.models.forward.install` puts it there and calls it after the language model; what it
returns takes the place of the logits, and the vocabulary projection does not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NAME = "task_head"
"""Its attribute of the model, and the first part of its parameters' names."""


class Readout(nn.Module):
    """Reads hidden states, attention or whatever else it watches, and returns one tensor.

    Subclasses set ``record`` and write ``forward``. Parameters must be the same on every rank: draw them from a
    generator of their own. A batch without any unit has to give a tensor of no rows that is still connected to every
    parameter, so that each rank takes part in each collective.

    Attributes:
        record: what ``task.json`` says of it, values of JSON: all that is needed to build it again.
        learning_rate: of its parameters; None for the run's.
    """

    record: Mapping[str, Any]
    learning_rate: float | None = None

    def watch(self, language_model: nn.Module) -> Sequence[RemovableHandle]:
        """Register hooks on layers of the language model, where its last hidden states are not enough; here none.

        Hooks must be bound methods, so that a copy of the model has hooks of its own. With gradient checkpointing they
        run again in the backward pass. What they keep must be given up in :meth:`forward`.
        """
        del language_model
        return ()

    def start(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare for one call of the language model.

        Args:
            inputs: ``readout_inputs`` of the batch, see :class:`qwenvl.tasks.objective.Objective`.

        Returns:
            Further arguments of the language model, such as ``output_hidden_states``.
        """
        del inputs
        return {}

    def unused(self, language_model: nn.Module) -> Sequence[nn.Module]:
        """Return the layers of the language model that its output does not depend on, which cannot train; here none."""
        del language_model
        return ()

    def forward(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return what the objective computes its loss and its metrics from.

        Args:
            output: of the language model, with ``last_hidden_state`` [B, T, H].
            inputs: ``readout_inputs`` of the batch.
        """
        raise NotImplementedError


def readout_of(model: Any) -> Readout | None:
    """Return the module of a model's task; None where it models language alone."""
    found: Readout | None = getattr(model, NAME, None)
    return found


def is_readout(name: str) -> bool:
    """Whether a parameter of this name belongs to the module of the task."""
    return name.startswith(f"{NAME}.")


def attach(model: Any, readout: Readout) -> None:
    """Make a readout part of a model, on its device; files of the model's own weights go without it."""
    device = next(model.parameters()).device
    model.add_module(NAME, readout.to(device) if device.type != "meta" else readout.to_empty(device=device))
    ignored = {f"{NAME}.{name}" for name in readout.state_dict()}
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *ignored}


def draw_normal(parameter: Tensor, deviation: float, seed: int) -> None:
    """Fill a parameter with normal numbers that do not depend on what was drawn before, nor on the device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
