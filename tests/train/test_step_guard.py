"""A step that is not finite changes nothing, and the run says which samples it had."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl.train import trainer
from qwenvl.train.train_qwen import main
from tests.train.runs import equal_bits, flags, history, train

STEPS: dict[str, Any] = {
    "dataset_use": "pictures",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "optim": "sgd",
}


class Fault:
    """Spoils the loss of chosen calls, as an overflow would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: range, factor: float) -> None:
        self.calls, self.factor, self.count = calls, factor, 0
        self.loss = trainer.batch_loss
        monkeypatch.setattr(trainer, "batch_loss", self)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.count += 1
        loss, output = self.loss(*args, **kwargs)
        return loss * (self.factor if self.count in self.calls else 1.0), output


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_step_is_skipped_and_its_samples_are_named(
    optim: str,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Fault(monkeypatch, range(4, 5), math.nan)  # the second batch of step 2
    output = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **{**STEPS, "optim": optim})
    assert equal_bits(output / "checkpoint-1", output / "checkpoint-2")
    assert not equal_bits(output / "checkpoint-2", output / "checkpoint-3")
    losses = history(output)
    assert [math.isfinite(loss) for loss in losses] == [True, False, True]
    assert history(output, "skipped_steps") == [1]
    (message,) = [record.message for record in caplog.records if "is skipped" in record.message]
    assert message.startswith("Step 2 is skipped: the loss is nan") and message.count("dataset 'pictures'") == 2


def test_mean_loss_leaves_the_skipped_step_out(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**STEPS, "save_strategy": "no", "learning_rate": 1e-12}
    single = history(train(tiny_checkpoint("qwen3_vl"), tmp_path / "single", registry, **settings))
    Fault(monkeypatch, range(4, 5), math.inf)
    output = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings, logging_steps=3)
    assert history(output) == pytest.approx([(single[0] + single[2]) / 2], rel=1e-5)
    assert history(output, "train_loss") == pytest.approx([(single[0] + single[2]) / 2], rel=1e-5)


def test_too_many_in_a_row_end_the_run(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Fault(monkeypatch, range(3, 1000), math.nan)
    settings = {**STEPS, "max_steps": 30, "max_bad_steps": 4, "save_steps": 3}
    assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)) == 1
    assert "4 steps in a row, up to step 5" in caplog.text and "learning rate" in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(("factor", "message"), [(math.nan, "first step is nan"), (0.0, "first step is 0 for")])
def test_first_step_must_be_sound(
    factor: float,
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Fault(monkeypatch, range(1, 3), factor)
    assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **STEPS)) == 1
    assert message in caplog.text
