"""What a run learns: the one seam between the trainer and a task (``--task``). Language modelling is the default.

    dataset      record -> tokens, pixels and a target        TargetReader (qwenvl.data.encoding.targets)
    collator     batch["sample_targets"]: the targets of its samples, in order
    prepare      batch -> what the model takes, and ``readout_inputs``: what its Readout has to know      on the host
    count        how many units a batch holds: trained tokens, labelled samples, phrases                  on the host
    total_weight their weights, added up: their number, but where answers have weights                    on the host
    forward      Readout (qwenvl.models.task_module), a module of the model: hidden states, attention -> a tensor
    summed_loss  that tensor and the targets -> the sum over the batch's units
    records      that tensor and the targets -> a record for each unit that was evaluated
    metrics      all records of all ranks -> numbers

The trainer divides the sum by the weights of the units of the whole optimizer step, over all ranks and accumulation
steps. So a task's loss, like that of language modelling, does not depend on how samples are split, padded or packed, as
long as
``summed_loss`` is a sum over units that do not see each other. Whatever has parameters belongs into the readout, which
runs inside the model's ``forward``, where every engine's hooks work; ``summed_loss`` has none.

Beside the model's own weights the readout's stand in ``task_head.safetensors``, and how to build it again in
``task.json`` (:mod:`qwenvl.tasks.files`). A new task is a ``TargetReader``, a ``Readout``, an ``Objective``, and
a line in :mod:`qwenvl.tasks.build`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

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

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make of a batch of the collator what the model takes; on the host.

        Returns:
            As :func:`qwenvl.models.loss.causal_lm.tell_host`. Other objectives give ``readout_inputs`` (a dict; its
            tensors go to the device) in the place of ``kept_positions`` and ``targets``, and leave ``sample_targets``
            in the batch, which the model does not get. Floating-point tensors may be rounded on the way to the device
            (DeepSpeed): keep targets as numbers or arrays until the loss is computed.
        """
        return tell_host(batch)

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the units of a batch of the collator, on the host."""
        return count_targets(batch)

    def total_weight(self, batch: Mapping[str, Any]) -> float:
        """Return what the summed loss of a batch of the collator is divided by for a mean, on the host."""
        return total_weight(batch) if "loss_weights" in batch else self.count(batch)

    def summed_loss(self, output: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss summed over the units of a batch: float32 [].

        Args:
            output: what the readout returned; of language modelling, the sum itself.
            batch: from :meth:`prepare`, on the device.
        """
        del batch
        # without our head a stock model takes the arguments it does not know without a word
        assert output.dim() == 0, "call qwenvl.models.forward.install first"
        return output

    def records(self, output: Tensor, batch: Mapping[str, Any]) -> list[Any]:
        """Return what is kept of an evaluated batch for :meth:`metrics`; values that can be sent to other ranks."""
        del output, batch
        return []

    def metrics(self, records: Sequence[Any]) -> dict[str, float]:
        """Return figures of the records of all ranks, in any order, by their names in logs without ``eval_``."""
        del records
        return {}

    def draw(self, records: Sequence[Any], folder: Path) -> None:
        """Write what is better seen than read (a confusion matrix) to the output folder; process 0 calls it."""


def batch_loss(
    objective: Objective,
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    units: Tensor | float,
    balance: Balance | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a batch and return its part of the loss, and what it was computed from.

    A batch without any unit gives zero, still connected to every parameter, so that a rank that holds one takes part
    in each collective.

    Args:
        objective: what is learned.
        model: a model with :func:`qwenvl.models.forward.install`, wrapped or not.
        batch: from ``objective.prepare``, on the device.
        units: what to divide by: those of the whole optimizer step, by their weights.
        balance: adds the auxiliary loss of a mixture of experts.

    Returns:
        (float32 scalar, the output of the readout).
    """
    output = run_model(model, batch, router_logits=balance is not None)
    loss = objective.summed_loss(output.logits, batch) / units
    return with_balance(loss, output, batch, balance), output.logits
