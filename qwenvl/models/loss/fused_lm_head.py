"""Vocabulary projection fused with cross entropy, without a tensor of all logits.

A row of logits has one column per entry of the vocabulary: 151,936 or 248,320. For 8,000 trained tokens that is 5 to
8 GB in float32, and backward needs it twice. Here rows are processed in chunks: logits, cross entropy and gradients of
one chunk are computed, and the logits freed, before the next chunk. Gradients are computed in the forward pass, while
the logits exist; as the loss is a plain sum, the backward pass only multiplies them by a factor. This is the idea of
Liger Kernel's fused linear cross entropy (Hsu et al., 2024, arXiv 2410.10989, section 3.2), here in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qwenvl.models.token_rows import ROWS, index_of, with_rows

CHUNK_ELEMENTS = 1 << 27
"""Number of logits in memory at a time: 883 rows of 151,936 columns, 0.5 GB in float32."""

SummedLoss = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(hidden states [n, H], weight [V, H], targets int64 [n], factors float32 [n] or None for 1, row losses float32 [n] to
fill or None) -> sum of factor x cross entropy, float32, in nats."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross entropy of ``hidden @ weight.T``; the forward pass computes both gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor | None,
        row_losses: Tensor | None,
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=_exact(dtype), device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            states = hidden[part].to(dtype)
            logits = states @ matrix.T
            scale = None if factors is None else factors[part].to(total.dtype)
            losses = _cross_entropy(logits.to(total.dtype), targets[part], scale)
            total += losses.sum()
            if row_losses is not None:
                row_losses[part] = losses
            if not (needs_hidden or needs_weight):
                continue
            slope = _gradient_of_logits(logits, targets[part], scale)
            if grad_hidden is not None:
                grad_hidden[part] = slope @ matrix
            if grad_weight is not None:
                _accumulate(grad_weight, slope.T, states)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if part is None else part.mul_(grad.to(part.dtype)) for part in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Return the type for sums over the vocabulary: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _cross_entropy(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    """Return the cross entropy of each row times its factor, [n]."""
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return losses if factors is None else losses * factors


def _gradient_of_logits(logits: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    """Return factor x (softmax(logits) - one_hot(targets)), [n, V], in the type of the logits."""
    slope = logits.softmax(-1, dtype=_exact(logits.dtype))
    slope.scatter_add_(1, targets[:, None], slope.new_full((len(targets), 1), -1.0))
    if factors is not None:
        slope *= factors[:, None]
    return slope.to(logits.dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a gradient in its own type, which is float32 under autocast while the product is not."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None = None,
    row_losses: Tensor | None = None,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return the summed cross entropy of a projection to the vocabulary.

    Computes in the type of autocast where it is on, as a linear layer does; cross entropy and softmax are float32.

    Args:
        hidden: [n, H], hidden states.
        weight: [V, H], weight of the projection.
        targets: int64 [n], the token that each row predicts, 0 to V - 1.
        factors: float32 [n], factor of each row's cross entropy; None if all are 1.
        row_losses: float32 [n], to be filled with the addends of the result, without a graph; None if not wanted.
        chunk_elements: Number of logits in memory at a time.

    Returns:
        Scalar, float32 (float64 for float64 hidden states), in nats. Its gradient can be computed once.
    """
    kind = hidden.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
    rows = max(1, chunk_elements // len(weight))
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, factors, row_losses, rows, dtype)
    return total


class LossHead(nn.Linear):
    """The output projection of a language model, which returns a loss instead of logits if targets are set.

    A layer rather than a function beside the model, because ZeRO-3 and FSDP gather a weight while the layer that holds
    it runs. It has the stock layer's parameters under the same names.

    Args:
        linear: Stock layer.
        summed_loss: Loss function.
    """

    def __init__(self, linear: nn.Linear, summed_loss: SummedLoss = linear_cross_entropy) -> None:
        assert set(linear.state_dict()) == {"weight"}, "no family has a bias here"
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.summed_loss = summed_loss
        self.targets: Tensor | None = None  # this and the three below are for the next call only
        self.target_weights: Tensor | None = None
        self.row_losses: Tensor | None = None
        self.mtp_inputs: Mapping[str, Tensor] | None = None  # of the rows of the MTP layer, after those of the model
        self.model_trains = True  # whether the rows before those of the MTP layer need a gradient
        self.passed: Tensor | None = None  # output of the call, if a task has a module of its own
        self.row_ids: list[int] = []
        self.rows: nn.Parameter | None
        self.register_parameter(ROWS, None)
        self.row_index: Tensor | None
        self.register_buffer("row_index", None, persistent=False)

    def train_rows(self, row_ids: Sequence[int], rows: nn.Parameter) -> None:
        """Take some rows of the weight from a parameter of their own.

        Args:
            row_ids: Ids of the trainable tokens, without repeats.
            rows: [len(row_ids), H].
        """
        self.row_ids = list(row_ids)
        self.rows = rows
        self.row_index = index_of(row_ids, self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V]; or, with ``targets`` set, the summed cross entropy of all rows, float32 scalar.

        ``target_weights`` are float32 factors of the rows, reinterpreted as int32 [n]; so is ``row_losses``, which is
        filled with the addends of the sum. With ``mtp_inputs`` (``targets`` int64 [m] and, if any is not 1, ``weights``
        as above) the last m rows are those of the MTP layer, and the result is [2]: the sum of the rows before them,
        and theirs.
        """
        targets, self.targets = self.targets, None
        weights, self.target_weights = self.target_weights, None
        row_losses, self.row_losses = self.row_losses, None
        mtp, self.mtp_inputs = self.mtp_inputs, None
        passed, self.passed = self.passed, None
        if passed is not None:
            return passed
        weight = self.weight
        if self.rows is not None and self.row_index is not None:
            weight = with_rows(weight, self.row_index, self.rows)
        if targets is None:
            return functional.linear(hidden, weight)
        rows = hidden.flatten(0, -2)
        if mtp is None:
            return self._summed(rows, weight, targets, weights, row_losses)
        own, drafts = rows.tensor_split([len(targets)])
        losses = (
            self._summed(own if self.model_trains else own.detach(), weight, targets, weights, row_losses),
            self._summed(drafts, weight, mtp["targets"], mtp.get("weights")),
        )
        return torch.stack(losses)

    def _summed(
        self, rows: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, row_losses: Tensor | None = None
    ) -> Tensor:
        factors, addends = (None if one is None else one.view(torch.float32) for one in (weights, row_losses))
        return self.summed_loss(rows, weight, targets, factors, addends)
