"""The trainer by itself: what a step is divided by, what is skipped, and how it evaluates."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState

from qwenvl.data.collator import for_model
from qwenvl.data.encoding.encoded import Item
from qwenvl.models.loss.causal_lm import run_model
from qwenvl.models.loss.moe_aux_loss import sample_of_tokens, summed_balance
from qwenvl.models.trainable.activation_offload import SMALL
from qwenvl.tasks.objective import Objective, causal_loss
from qwenvl.train.trainer import Trainer
from qwenvl.utils.errors import SampleError, UserError
from tests.e2e.runs import LORA

Open = Callable[..., Trainer]
EVALUATION = {"eval_dataset_use": "held_out", "eval_strategy": "steps", "per_device_eval_batch_size": 3}


def step_of(trainer: Trainer, batches: int = 2) -> tuple[list[dict[str, Any]], float, Tensor]:
    """Return the micro-batches of the first step, the units it is divided by, and the sum of their losses."""
    micro, units = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), batches, torch.device("cpu"))
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=units) for batch in micro]
    return micro, units, torch.stack(losses).sum()


def own_loss(trainer: Trainer, loader: Any) -> tuple[float, int]:
    """Return the summed loss and the trained tokens of all batches of a loader."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in loader:
            tokens += len(batch["targets"])
            total += causal_loss(trainer.model, for_model(batch), num_trained_tokens=1.0).item()
    return total, tokens


def origins(loader: Any) -> list[list[int]]:
    """Return the rows of each batch of a loader, by their numbers in the file."""
    return [[origin.line for origin in batch["origins"]] for batch in loader]


def test_evaluation_takes_the_rows_in_their_order_and_its_own_batch_size(
    trainer_of: Open,
) -> None:
    trainer = trainer_of(**{**EVALUATION, "eval_dataset_use": "mixed"})
    (*whole, last) = origins(trainer.get_eval_dataloader())
    first = whole[0][0]
    assert [*itertools.chain(*whole), *last] == list(range(first, first + 11))
    assert {len(batch) for batch in whole} == {3} and len(last) == 2
    other = trainer_of(**EVALUATION)
    assert [len(batch) for batch in origins(trainer.get_eval_dataloader(other.eval_dataset))] == [3, 1]


def test_training_takes_every_row_once_an_epoch_in_an_order_of_its_seed(
    trainer_of: Open,
) -> None:
    runs = [
        origins(trainer_of(**seed).get_train_dataloader())
        for seed in ({}, {"data_seed": 1}, {"data_seed": 1, "seed": 5})
    ]
    rows = [list(itertools.chain(*batches)) for batches in runs]
    assert all(len(set(order)) == 11 and order != sorted(order) for order in rows)
    assert rows[0] != rows[1] == rows[2]
    assert [len(batch) for batch in runs[0]] == [2, 2, 2, 2, 2, 1]


class TestStep:
    def test_loss_is_the_mean_over_the_trained_tokens_of_all_micro_batches(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        micro, units, loss = step_of(trainer)
        assert len(micro) == 2
        total, tokens = own_loss(trainer, itertools.islice(trainer.get_train_dataloader(), 2))
        assert units == tokens > 0
        assert loss.item() == pytest.approx(total / tokens, rel=1e-5)

    def test_the_last_step_of_an_epoch_has_fewer(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        micro, units = trainer.get_batch_samples(
            itertools.islice(trainer.get_train_dataloader(), 1), 4, torch.device("cpu")
        )
        assert len(micro) == 1 and units > 0

    def test_a_step_without_a_unit_has_a_loss_of_zero(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        loader = trainer.get_train_dataloader()
        (sample,) = trainer.train_dataset[1].samples  # type: ignore[index]
        untrained = replace(sample.tokens, labels=torch.full_like(sample.tokens.labels, -100))
        batch = loader.collate_fn([Item((replace(sample, tokens=untrained),))])
        (micro,), units = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        assert units == 0
        assert trainer.compute_loss(trainer.model, micro, num_items_in_batch=units).item() == 0.0

    def test_ranks_weigh_alike_on_request(self, trainer_of: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of two ranks alike, a rank's loss counts twice over the units of both, or once over its own."""
        losses, counts = [], []
        for average in (True, False):
            trainer = trainer_of(average_tokens_across_devices=average)
            monkeypatch.setattr(trainer, "_over_ranks", lambda *numbers: [2 * float(number) for number in numbers])
            monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
            _, units, loss = step_of(trainer)
            losses.append(loss.item())
            counts.append(units)
        assert counts[0] == 2 * counts[1]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_a_sample_that_must_stop_the_run_does(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        batch = next(iter(trainer.get_train_dataloader()))
        error = SampleError("media", "cannot be read", None)
        with pytest.raises(SampleError, match="cannot be read"):
            trainer.get_batch_samples(iter([batch | {"error": error}]), 1, torch.device("cpu"))

    def test_what_is_not_for_the_model_is_taken_out_and_samples_are_remembered(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        origins = [next(iter(trainer.get_train_dataloader()))["origins"], []]
        (micro, *_), _, _ = step_of(trainer, 1)
        assert not {"events", "error", "origins", "labels"} & micro.keys()
        assert trainer._samples == [str(origin) for origin in origins[0]] and len(trainer._samples) == 2

    def test_the_ranks_are_told_of_pictures_and_of_requests_to_stop(self, trainer_of: Open) -> None:
        """A step of text alone leaves the tower where it is: its rates are 0 until the optimizer's step."""
        trainer = trainer_of(dataset_use="pictures,text")
        loaders = [trainer_of(dataset_use=name).get_train_dataloader() for name in ("pictures", "text")]
        rates = []
        for loader, received in zip(loaders, (False, True), strict=True):
            optimizer = trainer.create_optimizer()
            trainer.stop_request.received = received
            trainer.get_batch_samples(iter(loader), 1, torch.device("cpu"))
            assert trainer.stop_request._agreed == received
            rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        assert set(rates[0].values()) == {1e-3}
        assert {name for name, rate in rates[1].items() if not rate} == {
            name for name in rates[1] if not name.startswith("language")
        }

    def test_the_watchdog_is_told_what_is_waited_for(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        trainer.state.global_step = 6
        step_of(trainer)
        told = trainer._watchdog._about
        assert told.startswith("step 7, batches of [((2, ") and all(sample in told for sample in trainer._samples)
        with pytest.raises(ZeroDivisionError):
            trainer.get_batch_samples(iter(1 // number for number in (0,)), 1, torch.device("cpu"))
        assert trainer._watchdog._about == "step 7, waiting for its samples"


class Doubled(Objective):
    """Language modelling that keeps a record of each evaluated batch."""

    unit = "words"

    def count(self, batch: Any) -> int:
        return 2 * super().count(batch)

    def records(self, output: Any, batch: Any) -> list[float]:
        return [output.logits.item() / len(batch["targets"])]

    def metrics(self, records: Sequence[float]) -> dict[str, float]:
        return {"batches": len(records), "worst": max(records)}

    def draw(self, records: Sequence[float], folder: Path) -> None:
        (folder / "drawn").write_text(str(len(records)))


def test_a_run_logs_evaluates_and_saves(trainer_of: Open, tmp_path: Path) -> None:
    """Two steps, of which the loss is the mean, and an evaluation of its own unit after the second."""
    settings = {"max_steps": 2, "logging_steps": 2, "eval_steps": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(**EVALUATION, **settings, learning_rate=1e-12)
    trainer.objective = Doubled()
    trainer.data_report.start_over()
    losses = iter(trainer_of(**settings).get_train_dataloader())
    sums = [own_loss(trainer, itertools.islice(losses, 2)) for _ in range(2)]
    trainer.train()
    assert trainer._first_step is None
    (logged, evaluated, _) = trainer.state.log_history
    assert logged["loss"] == pytest.approx(sum(total / tokens / 2 for total, tokens in sums) / 2, rel=1e-5)
    assert "skipped_steps" not in logged
    total, tokens = own_loss(trainer, trainer.get_eval_dataloader())
    assert evaluated["eval_words"] == 2 * tokens
    assert evaluated["eval_loss"] == pytest.approx(total / tokens / 2, rel=1e-5)
    assert evaluated["eval_batches"] == 2 and evaluated["eval_worst"] > evaluated["eval_loss"]
    assert (tmp_path / "out" / "drawn").read_text() == "2"
    loss = trainer.training_step(trainer.model, step_of(trainer)[0][0], 7.0)
    assert loss.item() == trainer.running_loss.of_step.item() > 0
    with trainer._watchdog.on_duty():
        trainer._watchdog.watch("a step")
        trainer._save_checkpoint(trainer.model, None)
        assert trainer._watchdog._deadline is None, "it watches steps; saving may take any time"
    assert (tmp_path / "out" / "checkpoint-2" / "running_loss.json").is_file()


class TestBalance:
    def test_the_auxiliary_loss_is_divided_by_all_tokens_of_the_step(self, trainer_of: Open) -> None:
        plain = trainer_of("qwen3_vl_moe")
        assert plain._balance(1) is None
        trainer = trainer_of("qwen3_vl_moe", router_aux_loss_coef=10.0)
        micro, units, loss = step_of(trainer)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in micro)
        assert tokens > 1.5 * units
        balance = trainer._balance(1)
        assert balance is not None and (balance.coefficient, balance.num_tokens) == (10.0, tokens)
        auxiliary = 0.0
        with torch.no_grad():
            for batch in micro:
                logits = run_model(trainer.model, {**batch, "output_router_logits": True}).router_logits
                auxiliary += summed_balance(logits, balance.top_k, *sample_of_tokens(batch)).item()
        without = step_of(plain)[2].item()
        assert loss.item() - without == pytest.approx(10 * auxiliary / tokens, rel=1e-3)

    def test_a_rank_that_counts_for_itself_divides_by_its_share(self, trainer_of: Open) -> None:
        trainer = trainer_of("qwen3_vl_moe", router_aux_loss_coef=1.0)
        trainer._tokens = 80.0
        trainer.accelerator.state.num_processes = 4
        try:
            shares = [trainer._balance(ranks) for ranks in (4, 1)]
        finally:
            trainer.accelerator.state.num_processes = 1
        assert [share and share.num_tokens for share in shares] == [80.0, 20.0]
        trainer._tokens = 0.0
        empty = trainer._balance(1)
        assert empty is not None and empty.num_tokens == 1.0


class TestEvaluation:
    def test_dropout_is_off(self, trainer_of: Open) -> None:
        settings = {**LORA, **EVALUATION, "lora_dropout": 0.5}
        trainer = trainer_of(**settings)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        trainer.model.eval()
        total, tokens = own_loss(trainer, trainer.get_eval_dataloader())
        trainer.model.train()
        noisy, _ = own_loss(trainer, trainer.get_eval_dataloader())
        assert abs(noisy - total) > 1e-3 * total, "dropout does nothing here"
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert metrics["eval_trained_tokens"] == tokens

    def test_without_a_unit_the_loss_is_no_number(self, trainer_of: Open) -> None:
        """0 would pass for the best loss."""
        trainer = trainer_of(**EVALUATION)
        output = trainer.evaluation_loop(DataLoader([]), "nothing", metric_key_prefix="test")
        assert output.metrics is not None
        assert math.isnan(output.metrics["test_loss"]) and output.metrics["test_trained_tokens"] == 0
        assert output.num_samples == 0 and output.predictions == ()

    def test_a_sample_that_must_stop_the_run_stops_it_here_too(self, trainer_of: Open) -> None:
        trainer = trainer_of(**EVALUATION)
        error = SampleError("media", "cannot be read", None)
        batches = [{**batch, "error": error} for batch in trainer.get_eval_dataloader()]
        with pytest.raises(SampleError, match="cannot be read"):
            trainer.evaluation_loop(batches, "")  # type: ignore[arg-type]

    def test_it_builds_no_graph(self, trainer_of: Open) -> None:
        trainer = trainer_of(**EVALUATION)
        seen: list[bool] = []
        trainer.model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
        assert trainer.evaluate()["eval_runtime"] > 0
        assert seen == [False, False]


class TestGradientNorm:
    def test_a_step_that_is_not_finite_leaves_no_gradient(self, trainer_of: Open) -> None:
        trainer = trainer_of(tune_mm_vision=False, max_bad_steps=2)
        trainer.create_optimizer()
        trainer._first_step = None
        weight = trainer.model.lm_head.weight
        for value, steps in ((2.0, 1), (math.nan, 1), (1.0, 2), (math.inf, 2)):
            trainer._samples = [f"row {value}"]
            trainer.running_loss.add(torch.tensor(1.0))
            weight.grad = torch.full_like(weight, value)
            norm = trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(value))
            assert (weight.grad is None) == (not math.isfinite(value))
            assert norm is not None and trainer.running_loss.of_step.item() == 0.0
            assert trainer.running_loss._steps == steps
        trainer.running_loss.add(torch.tensor(1.0))
        with pytest.raises(UserError, match="2 steps in a row, up to step 1,"):
            trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(math.nan))

    @pytest.mark.parametrize(
        ("loss", "skipped", "said"),
        [(1.0, False, None), (0.0, False, None), (math.nan, True, "Step 1 is skipped"), (math.nan, False, "DeepSpeed")],
    )
    def test_deepspeed_has_taken_the_step_or_skipped_it_by_then(
        self, loss: float, skipped: bool, said: str | None, trainer_of: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = trainer_of()
        trainer._first_step, trainer.is_deepspeed_enabled = None, True
        trainer.accelerator._optimizers.append(SimpleNamespace(step_was_skipped=skipped))
        trainer.running_loss.add(torch.tensor(loss))
        lost = pytest.raises(UserError, match="DeepSpeed took step 1, whose loss is nan: the weights are lost")
        with lost if said == "DeepSpeed" else contextlib.nullcontext():
            trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(1.0))
            assert trainer.running_loss._steps == (not skipped)
        assert ("is skipped" in caplog.text) == skipped

    def test_steps_that_find_the_scale_of_fp16_are_not_counted(self, trainer_of: Open) -> None:
        """Its gradients overflow now and then, while the loss is finite."""
        trainer = trainer_of(max_bad_steps=1)
        trainer._first_step, trainer.args.fp16 = None, True
        trainer.running_loss.add(torch.tensor(1.0))
        trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(math.inf))
        trainer.running_loss.add(torch.tensor(math.nan))
        with pytest.raises(UserError, match="1 steps in a row"):
            trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(math.inf))

    def test_the_first_step_is_looked_at_once(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        trainer._units = 3.0
        with pytest.raises(UserError, match="first step is 0 for 3 trained tokens"):
            trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(1.0))
        trainer._first_step = None
        trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(1.0))


class TestOptimizer:
    def test_rates_and_decay_are_those_of_the_flags(self, trainer_of: Open) -> None:
        trainer = trainer_of(learning_rate=1e-3, mm_projector_lr=1e-4, vision_tower_lr=1e-5, weight_decay=0.25)
        optimizer = trainer.create_optimizer()
        assert trainer.create_optimizer() is optimizer
        found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
        rates = {"vision": 1e-5, "merger": 1e-4, "language": 1e-3}
        assert found == {
            f"{part}/{kind}": (rate, 0.25 * (kind == "decay"))
            for part, rate in rates.items()
            for kind in ("decay", "no_decay")
        }

    def test_one_whose_package_is_missing_is_named(self, trainer_of: Open) -> None:
        trainer = trainer_of()
        trainer.args.optim = "galore_adamw"
        trainer.args.optim_target_modules = ["q_proj"]
        with pytest.raises(UserError, match="^--optim galore_adamw: .*galore"):
            trainer.create_optimizer()


@pytest.mark.parametrize("offload", [False, True])
def test_activations_are_kept_on_the_host_on_request(offload: bool, trainer_of: Open) -> None:
    """A device without memory has nothing that could be copied there."""
    trainer = trainer_of(activation_offload=offload, gradient_checkpointing=True)
    weight = torch.ones(SMALL, requires_grad=True, device="meta")
    refused = pytest.raises(NotImplementedError, match="copy out of meta") if offload else contextlib.nullcontext()
    with refused, trainer.compute_loss_context_manager():
        weight.exp()


def test_sums_over_ranks_are_exact(trainer_of: Open) -> None:
    """In float32, 2^24 + 1 tokens are 2^24."""
    trainer = trainer_of()
    assert trainer._over_ranks(2**24 + 1, True, False) == [2**24 + 1, 1.0, 0.0]


def test_running_loss_and_position_are_saved(trainer_of: Open, tmp_path: Path) -> None:
    trainer = trainer_of()
    trainer.running_loss.add(torch.tensor(3.0))
    trainer.running_loss.end_step(taken=True)
    trainer.save_position(tmp_path)
    assert {file.name for file in tmp_path.glob("*.json")} == {
        "dataset_losses.json",
        "running_loss.json",
        "sampler_state.json",
    }
    again = trainer_of()
    again.running_loss.take_up(str(tmp_path))
    assert again.running_loss.of_run(lambda total: total) == 3.0


class SignalAtBatch(TrainerCallback):
    """Sends SIGTERM to this process during the evaluation after step 2."""

    def __init__(self) -> None:
        self.batches = 0

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.batches += 1
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("steps", [4, 2])
def test_a_signal_during_an_evaluation_is_not_kept_waiting(steps: int, trainer_of: Callable[..., Trainer]) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_use": "held_out", "save_strategy": "no"}
    trainer = trainer_of(max_steps=steps, **evaluation, per_device_eval_batch_size=1)
    sender = SignalAtBatch()
    trainer.add_callback(sender)
    trainer.data_report.start_over()
    with trainer.stop_request.listening():
        trainer.train()
    assert sender.batches == 1, "of four"
    assert trainer.state.global_step == 2
    assert not [line for line in trainer.state.log_history if "eval_loss" in line]
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    assert (trainer.stop_request.stopped_at, checkpoint.is_dir()) == ((2, True) if steps == 4 else (None, False))
