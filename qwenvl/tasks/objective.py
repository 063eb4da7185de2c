"""What a run learns: the one seam between the trainer and a task (``--task``). Language modelling is the default.

    dataset   record -> tokens, pixels and a target            TargetReader (qwenvl.data.encoding.targets)
    collator  batch["sample_targets"]: the targets of its samples, in order
    begin     takes note of the model before it trains, to have a reference model for instance
    prepare   batch -> what compute needs                                                             on the host
    count     how many units a batch holds: trained tokens, labelled samples, phrases, pairs          on the host
    total_weight  the sum of their weights: their number, unless answers have weights                 on the host
    compute   model, prepared batch -> the loss summed over the batch's units, and outputs; one forward pass or several
    records   outputs -> a record for each unit that was evaluated
    metrics   all records of all ranks -> numbers

The trainer divides the sum by the weights of the units of the whole optimizer step, over all ranks and accumulation
steps. So a task's loss, like that of language modelling, does not depend on how samples are split, padded or packed, as
long as ``compute`` returns a sum over units that do not see each other.

Parameters of a task belong into a Readout (:mod:`qwenvl.models.task_module`), which runs inside the model's
``forward``, where every engine's hooks work. Its weights stand in ``task_head.safetensors`` beside the model's, and how
to build it again in ``task.json`` (:mod:`qwenvl.tasks.files`). A new task is a ``TargetReader``, an ``Objective``, a
``Readout`` if it has parameters of its own, and a line in :mod:`qwenvl.tasks.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from qwenvl.data.encoding.targets import TargetReader
from qwenvl.models.loss.causal_lm import Balance, count_targets, run_model, tell_host, total_weight, with_balance
from qwenvl.models.task_module import Readout


class Objective:
    """Language modelling, and the methods that other objectives write anew.

    Attributes:
        unit: what the loss is a mean of: a name for logs, in the plural.
        attention: name of the attention that the language model must have; None for any.
    """

    unit = "trained_tokens"
    attention: str | None = None

    def build_readout(self, config: PretrainedConfig) -> Readout | None:
        """Return the module that trains beside a model of this config; None for language modelling, which has none.

        Parameters have to be drawn alike on every rank, and may be on the meta device.
        """
        del config
        return None

    def begin(self, model: nn.Module) -> None:
        """Take note of a model that is loaded and ready, before it trains and before a checkpoint is loaded into it."""

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make of a batch of the collator what :meth:`compute` takes; on the host.

        Returns:
            As :func:`qwenvl.models.loss.causal_lm.tell_host`. An objective with a module gives ``readout_inputs`` (a
            dict; its tensors go to the device) in the place of ``kept_positions`` and ``targets``. ``sample_targets``
            may stay in the batch: the model does not get it. Floating-point tensors may be rounded on the way to the
            device (DeepSpeed): keep targets as numbers or arrays until the loss is computed.
        """
        return tell_host(batch)

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the units of a batch of the collator, on the host."""
        return count_targets(batch)

    def total_weight(self, batch: Mapping[str, Any]) -> float:
        """Return what the summed loss of a batch of the collator is divided by for a mean, on the host."""
        return total_weight(batch) if "loss_weights" in batch else self.count(batch)

    def compute(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Run a batch; return its loss, summed over its units, and what else there is to know.

        A batch without any unit gives zero, still connected to every parameter, so that a rank that holds one takes
        part in each collective.

        Args:
            model: Model with :func:`qwenvl.models.forward.install`, wrapped or not.
            batch: Batch from :meth:`prepare`, on the device.

        Returns:
            (float32 [], outputs for :meth:`records`). Where the batch says ``output_router_logits``, the outputs hold
            ``router_logits``, for the auxiliary loss of a mixture of experts.
        """
        output = run_model(model, batch)
        # without our head a stock model takes the arguments it does not know without a word
        assert output.logits.dim() == 0, "call qwenvl.models.forward.install first"
        return output.logits, output

    def scores(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        """Return what a saved folder has to compute again for a prepared batch, float32; None for nothing of its own.

        What it computes again is :attr:`qwenvl.tasks.registry.TaskKind.saved_scores`.
        """
        del model, batch
        return None

    def records(self, output: Any, batch: Mapping[str, Any]) -> list[Any]:
        """Return what is kept of an evaluated batch for :meth:`metrics`; values that can be sent to other ranks."""
        del output, batch
        return []

    def metrics(self, records: Sequence[Any]) -> dict[str, float]:
        """Return figures of the records of all ranks, in any order, by their names in logs without ``eval_``."""
        del records
        return {}

    def draw(self, records: Sequence[Any], folder: Path) -> None:
        """Write what is better seen than read (a confusion matrix) to the output folder; process 0 calls it."""


@dataclass(frozen=True)
class Task:
    """What a run learns.

    Args:
        objective: How it is learned.
        targets: Reader of what it wants to know of each sample; None for language modelling.
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
    """Run a batch and return its part of the loss of an optimizer step, and the outputs of its objective.

    Args:
        objective: What is learned.
        model: Model with :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: Batch from ``objective.prepare``, on the device.
        units: Number to divide by: the units of the whole optimizer step, by their weights.
        balance: Auxiliary loss of a mixture of experts, to be added; None for none.

    Returns:
        (float32 [], outputs of ``objective.compute``).
    """
    if balance is not None:
        batch = {**batch, "output_router_logits": True}
    loss, output = objective.compute(model, batch)
    return with_balance(loss / units, output, batch, balance), output
