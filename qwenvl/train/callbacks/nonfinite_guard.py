"""Check optimizer steps: finite loss and gradient; in the first step, a positive loss and a gradient everywhere."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from qwenvl.models.loss.causal_lm import GradientWatch
from qwenvl.utils.distributed import gather_objects
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

_CAUSES = (
    "Usual causes: a learning rate that is too high or without warm-up; fp16, where bf16 is possible; weights that did "
    "not load; overlap_comm in a DeepSpeed configuration with a DeepSpeed older than 0.19."
)


class StepGuard:
    """Counts consecutive optimizer steps with a loss or gradient that is not finite.

    Args:
        limit: Number of such steps that ends the run (``--max_bad_steps``).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0

    def skipped(self, step: int, loss: float, norm: float, samples: Sequence[str]) -> None:
        """Report a skipped step; every rank must call it.

        Args:
            step: Number of the step, from 1.
            loss: Loss of this rank.
            norm: Norm of the gradient over all ranks.
            samples: Origins of the samples in this rank's batches.

        Raises:
            UserError: The limit is reached.
        """
        self._in_a_row += 1
        logger.warning("%s", describe_skip(step, norm, gather_objects((loss, list(samples)))))
        if self._in_a_row >= self._limit:
            raise UserError(
                f"{self._in_a_row} steps in a row, up to step {step}, had a loss or a gradient that is not finite "
                f"(--max_bad_steps {self._limit}). {_CAUSES} The newest checkpoint was saved before or between them."
            )

    def taken(self) -> None:
        """Record a step that was taken."""
        self._in_a_row = 0


def describe_skip(step: int, norm: float, ranks: Sequence[tuple[float, Sequence[str]]]) -> str:
    """Return a message about a skipped step, with the samples of the ranks whose loss is not finite, or of all ranks.

    Args:
        step: Number of the step, from 1.
        norm: Norm of the gradient over all ranks.
        ranks: Loss and samples of each rank.
    """
    losses = ", ".join(f"{loss:.4g}" for loss, _ in ranks)
    suspects = [sample for loss, of_rank in ranks for sample in of_rank if not math.isfinite(loss)]
    suspects = suspects or [sample for _, of_rank in ranks for sample in of_rank]
    listed = "".join(f"\n  {sample}" for sample in suspects)
    return f"Step {step} is skipped: the loss is {losses} and the norm of the gradient {norm}. Its samples:{listed}"


class FirstStep:
    """Checks the first optimizer step of a run for faults that would show in every step.

    Args:
        model: Model with frozen and trainable parts set, not wrapped.
        unit: Name of the units that the loss is averaged over.
    """

    def __init__(self, model: PreTrainedModel, unit: str = "trained_tokens") -> None:
        self._unit = unit.replace("_", " ")
        self._watch = GradientWatch(model)

    def check(self, loss: float, units: float) -> None:
        """Check the step after its backward pass, before gradients are cleared.

        Args:
            loss: Mean loss over the units of all ranks.
            units: Number of units in the step, over all ranks.

        Raises:
            UserError: The loss is not finite, or zero although the step has units; or a trainable tensor got no
                gradient.
        """
        missing = self._watch.missing()
        self._watch.close()
        if not math.isfinite(loss):
            raise UserError(f"The loss of the first step is {loss}. {_CAUSES}")
        if loss == 0 and units > 0:
            raise UserError(
                f"The loss of the first step is 0 for {units:g} {self._unit}, which means broken labels or weights. "
                "Inspect the labels with tools/show_sample.py, and check the checkpoint's weights."
            )
        if missing:
            raise UserError(
                f"{len(missing)} trainable tensors got no gradient in the first step: {', '.join(missing[:10])}"
                f"{' ...' if len(missing) > 10 else ''}. The loss does not reach them, so they would never train."
            )
