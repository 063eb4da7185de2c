"""Liger Kernel's fused vocabulary projection and cross entropy, an optional dependency."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from qwenvl.models.loss.fused_lm_head import SummedLoss, linear_cross_entropy
from qwenvl.utils.errors import UserError


def open_liger_loss() -> SummedLoss:
    """Return Liger Kernel's loss in the form of :func:`qwenvl.models.loss.fused_lm_head.linear_cross_entropy`.

    Its kernel supports no factors of rows, returns no losses of rows, and divides by zero where there are no rows: for
    a batch with loss weights or without trained tokens, and where row losses are wanted without gradients (in
    evaluations), that function computes the loss. In training, row losses stay as they are.

    Raises:
        UserError: There is no CUDA device, or the package is missing or too old.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "--use_liger_kernel: its Triton kernels need a CUDA device, and there is none. Leave it out: the loss is "
            "computed in chunks of trained tokens anyway."
        )
    return load_liger_loss()


def load_liger_loss() -> SummedLoss:
    """Import the package and return its loss; :func:`open_liger_loss` also checks for a device."""
    try:
        module: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    except ImportError as error:
        raise UserError(
            f"--use_liger_kernel: liger-kernel cannot be imported ({error}). pip install 'liger-kernel>=0.6', or leave "
            "the flag out: the loss is computed in chunks of trained tokens anyway."
        ) from error
    function = module.LigerFusedLinearCrossEntropyFunction

    def summed_loss(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor | None = None,
        row_losses: Tensor | None = None,
    ) -> Tensor:
        told = row_losses is not None and not torch.is_grad_enabled()
        if factors is not None or told or not len(hidden):
            return linear_cross_entropy(hidden, weight, targets, factors, row_losses)
        # positional, as autograd functions are called: no bias, no class weights, -100 ignored, no z-loss, no smoothing
        outcome = function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
        total: Tensor = outcome[0] if isinstance(outcome, tuple) else outcome
        return total.float()

    return summed_loss
