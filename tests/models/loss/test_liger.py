"""Liger Kernel's loss against ours; its kernels run in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qwenvl.models.loss.liger import open_liger_loss
from qwenvl.utils.errors import UserError

COMPARE = """
import torch
from qwenvl.models.loss.fused_lm_head import linear_cross_entropy
from qwenvl.models.loss.liger import load_liger_loss

torch.manual_seed(0)
hidden, weight = torch.randn(37, 32, requires_grad=True), torch.randn(301, 32, requires_grad=True)
targets = torch.randint(0, 301, (37,))
factors = torch.rand(37)
weighted = [loss(hidden, weight, targets, factors) for loss in (load_liger_loss(), linear_cross_entropy)]
assert torch.equal(*weighted)
for factor, rows in ((1.0, 37), (0.01, 37), (1.0, 0)):
    found = []
    for loss in (load_liger_loss(), linear_cross_entropy):
        total = loss(hidden[:rows], weight, targets[:rows])
        assert total.dtype == torch.float32 and (total != 0) == (rows > 0)
        found.append([total.detach(), *torch.autograd.grad(total * factor, [hidden, weight])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
"""


def test_its_loss_and_gradients_are_ours() -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is imported
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to run it on")
def test_without_a_device_it_is_refused() -> None:
    with pytest.raises(UserError, match="--use_liger_kernel: its Triton kernels need a CUDA device"):
        open_liger_loss()
