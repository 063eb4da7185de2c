"""The interface between the trainer and a task (``--task``). Language modelling is the default.

    dataset   record -> tokens, pixels and a target            TargetReader (qwenvl.data.encoding.targets)
    collator  batch["sample_targets"]: the targets of its samples, in order
    begin     gets the model before training, to keep a reference model for instance
    prepare   batch -> the inputs of compute                                                          in a worker
    count     batch -> its number of units: trained tokens, labelled samples, phrases, pairs          on the host
    total_weight  batch -> the sum of their weights: their number, unless answers have weights        on the host
    compute   model, prepared batch -> the loss summed over the batch's units, and outputs; one forward pass or several
    records   outputs -> a record for each evaluated unit
    metrics   all records of all ranks -> numbers

The trainer divides the sum by the total weight of the units of the whole optimizer step, over all ranks and
accumulation steps. So the loss of any task is independent of how samples are split, padded or packed, as long as
``compute`` returns a sum over units that do not attend to each other.

Losses by dataset and by sample come from the same pass: ``compute`` leaves the addends of its sum in the outputs, as
``unit_losses``, and ``prepare`` says in ``sample_of_unit`` which sample of the batch each belongs to.

Parameters of a task belong in a Readout (:mod:`qwenvl.models.task_module`), which runs inside the model's ``forward``,
where the hooks of DeepSpeed and FSDP work. Its weights are saved as ``task_head.safetensors`` beside the model's, and
its config as ``task.json`` (:mod:`qwenvl.tasks.files`). A new task needs a ``TargetReader``, an ``Objective``, a
``Readout`` if it has parameters of its own, and a line in :mod:`qwenvl.tasks.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qwenvl.data.encoding.targets import TargetReader
from qwenvl.models.loss.causal_lm import Balance, count_targets, prepare_inputs, run_model, total_weight, with_balance
from qwenvl.models.task_module import Readout
from qwenvl.utils.distributed import zeros_for_sums


class Objective:
    """Language modelling, and the base class of other objectives.

    Attributes:
        unit: Unit that the loss is averaged over: a plural noun for logs.
        attention: Attention implementation that the language model must have; None for any.
        apart: Losses that logs show by themselves rather than in ``loss``, and their weights in the sum.
    """

    unit = "trained_tokens"
    attention: str | None = None
    apart: Mapping[str, float] = MappingProxyType({})

    def build_readout(self, config: PretrainedConfig) -> Readout | None:
        """Return the module that is trained with a model of this config; None for language modelling.

        Initial parameters have to be equal on every rank, and may be on the meta device.
        """
        del config
        return None

    def begin(self, model: nn.Module) -> None:
        """Get the loaded model before training, and before a checkpoint is loaded into it."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what the workers of the data loader get if they are not forked: everything but models."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, nn.Module)}

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Convert a batch of the collator to the inputs of :meth:`compute`, in a worker of the data loader.

        It sees no model, and its result is pinned and sent to the trainer's process.

        Returns:
            The batch as from :func:`qwenvl.models.loss.causal_lm.prepare_inputs`. An objective with a module returns
            ``readout_inputs`` (a dict; its tensors are moved to the device) instead of ``kept_positions`` and
            ``targets``. ``sample_targets`` may stay in the batch: the model does not get it. DeepSpeed may round
            floating-point tensors when it moves them: keep targets as numbers or arrays until the loss is computed.
            ``sample_of_unit`` int64 [units] is the place in the batch of each unit's sample.
        """
        return prepare_inputs(batch)

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of units of a batch of the collator, on the host."""
        return count_targets(batch)

    def total_weight(self, batch: Mapping[str, Any]) -> float:
        """Return the total weight of a batch's units, the divisor of its summed loss, on the host."""
        return total_weight(batch) if "loss_weights" in batch else self.count(batch)

    def compute(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Run a batch; return its loss, summed over its units, and further outputs.

        A batch without units gives zero, still connected to every parameter in the graph, so that its rank takes part
        in every collective.

        Args:
            model: Model with :func:`qwenvl.models.forward.install`, wrapped or not.
            batch: Batch from :meth:`prepare`, on the device.

        Returns:
            (float32 [], outputs for :meth:`records`). The outputs have an attribute ``unit_losses``, float32 [units]
            without a graph, the addends of the sum; without it, there is no loss by dataset. Where the batch says
            ``output_router_logits``, they hold ``router_logits``, for the auxiliary loss of a mixture of experts.
        """
        output = run_with_unit_losses(model, batch)
        # without our head, a stock model silently ignores the arguments that it does not know
        assert output.logits.dim() == 0, "call qwenvl.models.forward.install first"
        return output.logits, output

    def losses_apart(self, output: Any) -> Mapping[str, Tensor]:
        """Return the losses :attr:`apart`, summed over the units and not weighted, float32 [], from the outputs."""
        del output
        return {}

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the scores of a prepared batch, float32, which a saved folder has to reproduce; None for no scores.

        The saved folder's are computed by :attr:`qwenvl.tasks.registry.Predictor.scores`.
        """
        del model, batch
        return None

    def records(self, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Return a record for each unit of an evaluated batch, or none, for :meth:`metrics`.

        Records are values that can be sent to other ranks.
        """
        del output, batch
        return []

    def metrics(self, records: Sequence[Any]) -> dict[str, float]:
        """Return metrics of the records of all ranks, in any order, by their names in logs without ``eval_``."""
        del records
        return {}

    def draw(self, records: Sequence[Any], folder: Path) -> None:
        """Write figures, such as a confusion matrix, to the output folder. Only rank 0 calls it."""


def run_with_unit_losses(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a prepared batch of language modelling; return the model's output, with ``unit_losses``.

    Args:
        model: Model with :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: Batch from :meth:`Objective.prepare`, on the device.
    """
    targets: Tensor = batch["targets"]
    losses = torch.zeros(targets.shape, device=targets.device)
    # as integers, since DeepSpeed and FSDP2 copy floating-point inputs to round them
    output = run_model(model, {**batch, "row_losses": losses.view(torch.int32)})
    output.unit_losses = losses
    return output


@dataclass(frozen=True)
class Task:
    """The task of a run.

    Args:
        objective: Objective of training.
        targets: Reader of the target of each sample; None for language modelling.
    """

    objective: Objective = field(default_factory=Objective)
    targets: TargetReader | None = None


def batch_loss(
    objective: Objective,
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    units: Tensor | float,
    balance: Balance | None = None,
) -> tuple[Tensor, Any]:
    """Run a batch and return its share of the loss of an optimizer step, and the outputs of its objective.

    Args:
        objective: Objective of training.
        model: Model with :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: Batch from ``objective.prepare``, on the device.
        units: Divisor of the loss: the total weight of the units of the whole optimizer step.
        balance: Auxiliary loss of a mixture of experts to add; None for none.

    Returns:
        (float32 [], outputs of ``objective.compute``).
    """
    if balance is not None:
        batch = {**batch, "output_router_logits": True}
    loss, output = objective.compute(model, batch)
    return with_balance(loss / units, output, batch, balance), output


def causal_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    num_trained_tokens: Tensor | float,
    balance: Balance | None = None,
) -> Tensor:
    """Run a batch of language modelling and return its part of the loss.

    The vocabulary projection runs on the trained positions only. A batch without a trained token gives zero, still
    connected to every parameter, so that its rank takes part in each collective.

    Args:
        model: Model with :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: Batch from :func:`qwenvl.models.loss.causal_lm.prepare_inputs`, on the device.
        num_trained_tokens: Divisor: the trained tokens (:func:`qwenvl.models.loss.causal_lm.total_weight`) of the whole
            optimizer step, over all ranks and accumulation steps, so that the sum of the parts does not depend on the
            split.
        balance: Auxiliary loss of a mixture of experts to add; None for none.

    Returns:
        float32 scalar: sum of weight x cross entropy over the batch's trained tokens, in nats, /
        ``num_trained_tokens``; with ``balance``, plus its coefficient x the batch's auxiliary loss summed over tokens /
        ``num_tokens``.
    """
    return batch_loss(Objective(), model, batch, units=num_trained_tokens, balance=balance)[0]


def weights_of_samples(batch: Mapping[str, Any]) -> np.ndarray:
    """Return the total weight of the units of each sample in a prepared batch on the host: float64 [samples]."""
    weights: Tensor | None = batch.get("target_weights")
    factors = None if weights is None else weights.view(torch.float32).numpy()
    return np.bincount(batch["sample_of_unit"].numpy(), factors, batch["num_samples"]).astype(np.float64)


def losses_of_samples(output: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the loss of each sample in a batch, summed over its units, without waiting for the device.

    Args:
        output: Outputs of ``objective.compute``.
        batch: The prepared batch, on the device.

    Returns:
        float64 [samples], without a graph; None if the objective gives no losses of its units.
    """
    losses: Tensor | None = getattr(output, "unit_losses", None)
    if losses is None:
        return None
    sums = zeros_for_sums(batch["num_samples"], losses.device)
    return sums.index_add_(0, batch["sample_of_unit"], losses.detach().to(sums.dtype))
