"""Language modelling that also trains the layer for multi-token prediction (``--train_mtp``).

The layer is a draft model for speculative decoding: at position t it sees the tokens up to t + 1, of its sample alone,
and predicts token t + 2. It is trained on the tokens that the language model is trained on, with their weights:

    labels       -100  -100    7    8    9  -100
    language        .     x    x    x    .     .      targets 7 8 9
    MTP             x     x    x    .    .     .      targets 7 8 9, one position earlier

    loss = (sum of the language model's cross entropy + ``--mtp_loss_weight`` x sum of the MTP layer's) / trained tokens

The token at index 1 of a sample has no position for this. As both sums have the same divisor, the loss depends neither
on packing nor on the split over accumulation steps and ranks. Gradients of the MTP layer's loss also reach the language
model, its embeddings and ``lm_head``, as far as they train: as in DeepSeek-V3 (arXiv 2412.19437, equations 21 to 25),
whose weight was 0.3 and then 0.1, and in Megatron-LM, whose default is 0.1 (``--mtp-loss-scaling-factor``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwenvl.models.loss.causal_lm import IGNORED_LABEL
from qwenvl.tasks.objective import Objective, run_with_unit_losses

LOSS = "mtp_loss"
"""Name of the layer's loss in logs, without ``--mtp_loss_weight``; its perplexity is that of drafts."""


def mtp_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the positions of a batch that the MTP layer is trained at, and the tokens that they predict.

    Args:
        batch: Batch of the collator, on the host: ``labels`` int64 [B, T]; ``loss_weights`` float32 [B, T], present if
            any is not 1; ``cu_seq_lens_q`` if flattened.

    Returns:
        ``positions`` int64 [m], indices into the flattened rows; ``targets`` int64 [m]; and, if any weight is not 1,
        ``weights`` int32 [m]: float32 factors reinterpreted as integers, as in
        :func:`qwenvl.models.loss.causal_lm.prepare_inputs`.
    """
    labels: Tensor = batch["labels"]
    kept = torch.zeros_like(labels, dtype=torch.bool)
    kept[:, :-2] = labels[:, 2:] != IGNORED_LABEL
    borders: Tensor | None = batch.get("cu_seq_lens_q")
    if borders is not None:
        for before in (1, 2):  # the last two positions of a sample, whose token after the next is another sample's
            kept[:, (borders[1:] - before).clamp(min=0).long()] = False
    found = {"positions": kept.flatten().nonzero().squeeze(1), "targets": labels[:, 2:][kept[:, :-2]]}
    weights: Tensor | None = batch.get("loss_weights")
    if weights is not None:
        found["weights"] = weights[:, 2:][kept[:, :-2]].view(torch.int32)
    return found


class MultiTokenObjective(Objective):
    """Language modelling with another loss for the MTP layer; evaluations report the language model's loss as theirs.

    Args:
        weight: Factor of the MTP layer's loss.
    """

    def __init__(self, weight: float) -> None:
        self.apart = {LOSS: weight}

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add ``mtp_inputs`` to the model's inputs."""
        return {**super().prepare(batch), "mtp_inputs": mtp_inputs(batch)}

    def compute(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Return the sum of both losses where gradients are computed, that of the language model elsewhere."""
        output = run_with_unit_losses(model, batch)
        language, mtp = output.logits
        output.mtp_loss = mtp.detach()
        return language + self.apart[LOSS] * mtp if torch.is_grad_enabled() else language, output

    def losses_apart(self, output: Any) -> Mapping[str, Tensor]:
        """Return the MTP layer's loss."""
        return {LOSS: output.mtp_loss}
