"""A step that is not finite changes nothing, and the run says which samples it had."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl.train import trainer
from qwenvl.train.callbacks.nonfinite_guard import FirstStep, StepGuard, describe_skip
from qwenvl.train.train_qwen import main
from qwenvl.utils.errors import UserError
from tests.e2e.runs import equal_bits, flags, history, train

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


def test_only_steps_in_a_row_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    guard = StepGuard(3)
    for step in (1, 2, 4, 5):
        guard.skipped(step, math.nan, math.inf, ["a.json, line 7", "b.json, line 2"])
        if step == 2:
            guard.taken()
    assert "Step 5 is skipped: the loss is nan and the norm of the gradient inf." in caplog.text
    assert caplog.text.count("\n  a.json, line 7\n  b.json, line 2") == 4
    with pytest.raises(UserError, match=r"^3 steps in a row, up to step 6, .*--max_bad_steps 3"):
        guard.skipped(6, math.nan, math.inf, [])


def test_one_step_is_too_many_where_one_is_allowed() -> None:
    with pytest.raises(UserError, match=r"^1 steps in a row, up to step 1,"):
        StepGuard(1).skipped(1, math.nan, 1.0, [])


def test_the_samples_of_the_ranks_whose_loss_is_not_finite_are_named() -> None:
    told = describe_skip(3, 1.5, [(2.0, ["a"]), (math.nan, ["b", "c"]), (math.inf, ["d"])])
    assert told == (
        "Step 3 is skipped: the loss is 2, nan, inf and the norm of the gradient 1.5. Its samples:\n  b\n  c\n  d"
    )


def test_samples_are_named_where_the_loss_is_finite_too(caplog: pytest.LogCaptureFixture) -> None:
    """The gradient is not, and nobody knows which of them it was."""
    StepGuard(2).skipped(1, 2.5, math.nan, ["a.json, line 7"])
    assert "the loss is 2.5 and the norm of the gradient nan" in caplog.text and "a.json, line 7" in caplog.text


@pytest.mark.parametrize(
    ("loss", "units", "message"),
    [
        (2.0, 5.0, None),
        (0.0, 0.0, None),
        (0.0, 1.0, r"first step is 0 for 1 labelled samples"),
        (math.nan, 5.0, r"first step is nan\. Usual causes"),
        (math.inf, 0.0, r"first step is inf"),
    ],
)
def test_first_step_must_have_a_loss(loss: float, units: float, message: str | None) -> None:
    first = FirstStep(torch.nn.Linear(2, 0), "labelled_samples")
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        for parameter in first._watch._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        first.check(loss, units)


def test_first_step_must_reach_everything_that_trains() -> None:
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(12))
    model[3].weight.requires_grad_(False)
    first = FirstStep(model)
    model[0](torch.ones(2)).sum().backward()
    with pytest.raises(
        UserError, match=r"^10 trainable tensors got no gradient in the first step: 1\.weight, 2.*11\.weight\. The loss"
    ):
        first.check(1.0, 1.0)


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
