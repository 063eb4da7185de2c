"""Training with compiled layers, against training without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo

from tests.config.flags import rejected
from tests.e2e.runs import history, largest_difference, train


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_train_alike(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "data_flatten": True}
    settings |= {"gradient_checkpointing": "language", "gradient_accumulation_steps": 2}
    plain = train(tiny_checkpoint("qwen3_vl"), tmp_path / "plain", registry, **settings)
    torch._dynamo.reset()  # graphs of other tests in this process
    with torch._dynamo.config.patch(error_on_recompile=True):  # whatever the number of samples and images
        compiled = train(tiny_checkpoint("qwen3_vl"), tmp_path / "compiled", registry, torch_compile=True, **settings)
    assert history(compiled) == pytest.approx(history(plain), rel=1e-5)
    assert largest_difference(compiled, plain) < 1e-5


def test_compiled_layers_are_refused_where_weights_are_gathered(tmp_path: Path) -> None:
    assert "--torch_compile with" in rejected("--torch_compile", "--fsdp", "True")
