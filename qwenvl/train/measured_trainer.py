"""The trainer with instruments: figures on every log line, and a profile of a few steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwenvl.data.sample_stats import MEASURES
from qwenvl.families import get_family
from qwenvl.models.lora.adapters import adapter_sizes, trains_whole
from qwenvl.models.loss.causal_lm import count_tokens
from qwenvl.models.trainable.freezing import parameter_modules
from qwenvl.models.trainable.param_groups import learning_rates_of
from qwenvl.profiling.device_specs import known_peak, name_device
from qwenvl.profiling.flops import Flops, Trained, training_flops
from qwenvl.profiling.profiler import Phase, StepProfile
from qwenvl.profiling.throughput import Throughput, measure_batch
from qwenvl.train.callbacks.progress import follow
from qwenvl.train.generation_eval import AskingTrainer

logger = logging.getLogger(__name__)


class MeasuredTrainer(AskingTrainer):
    """The trainer, which also says how fast it is; what it computes is the same.

    Args:
        options: of :class:`qwenvl.train.generation_eval.AskingTrainer`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.flops = flops_of(self.model)
        self.throughput = Throughput(self.flops, self._peak(), self.args.device)
        folder = Path(self.args.output_dir) / "profile"
        self.profile = StepProfile(self.args.profile_steps, folder, self.args.device, self.throughput.paused)
        follow(self)
        self.add_callback(_StartOver(self._start_over))
        self.add_callback(self.profile)
        self._group_names: list[str] = []
        self._main_group = 0
        self._rates_differ = False
        self._rates: dict[str, float] = {}

    def _peak(self) -> float | None:
        """Return the operations a second that each device can do at best, as given or known."""
        if self.args.device_peak_tflops is not None:
            return 1e12 * self.args.device_peak_tflops
        name = name_device(self.args.device)
        peak = known_peak(name)
        if peak is None:
            logger.info("MFU is left out: the peak of this device, %s, is not known (--device_peak_tflops).", name)
        return peak

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, and keep the names of its groups: engines return states without them."""
        optimizer = super().create_optimizer(model)
        self._group_names = [group["name"] for group in optimizer.param_groups]
        # a schedule that began already, as with --auto_find_batch_size, has noted the rates it began with
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._main_group = rates.index(self.args.learning_rate) if self.args.learning_rate in rates else 0
        self._rates_differ = len(set(rates)) > 1
        return optimizer

    def _get_learning_rate(self) -> float:
        """Return the rate of the parts that have no learning rate of their own, and note those of all parts.

        The Trainer logs that of the first group, which is the vision tower's wherever it trains. Where every part has
        its own, there is no other to log.
        """
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if self._rates_differ:
            groups = zip(self._group_names, rates, strict=True)
            of_parts = learning_rates_of([{"name": name, "lr": rate} for name, rate in groups])
            self._rates = {f"learning_rate_{part}": rate for part, rate in of_parts.items()}
        return rates[self._main_group]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """Collect the micro-batches of an optimizer step, and count them and the time of waiting for them."""
        self.throughput.run()
        batches, trained_tokens = super().get_batch_samples(self._watched(epoch_iterator), num_batches, device)
        for batch in batches:
            self.throughput.count(batch)
        return batches, trained_tokens

    def _watched(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            self.profile.enter(Phase.DATA)
            with self.throughput.waiting():
                batch = next(batches, None)
            self.profile.enter(Phase.OTHER)
            if batch is None:
                return
            yield batch

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a micro-batch; its backward pass comes next."""
        loss = super().compute_loss(*args, **kwargs)
        self.profile.enter(Phase.BACKWARD)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch; after the last one of a step comes the optimizer."""
        loss = super().training_step(*args, **kwargs)
        self.profile.enter(Phase.OPTIMIZER if self.accelerator.sync_gradients else Phase.OTHER)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a micro-batch, which add up to ``total_flos``."""
        return int(self.flops.count(np.array(measure_batch(inputs), MEASURES)))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of usable samples for ``non_padding``, flattened or not; else as the Trainer does."""
        if self.args.include_num_input_tokens_seen != "non_padding":
            super()._track_num_input_tokens(inputs)
            return
        tokens = torch.tensor(count_tokens(inputs), device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; it is no time of training."""
        with self._unmeasured():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint; it is no time of training either."""
        with self._unmeasured():
            super()._save_checkpoint(model, trial)

    def _start_over(self) -> None:
        """Forget what was counted before ``--auto_find_batch_size`` began the run again."""
        self.throughput.start_over()
        self.running_loss.start_over()
        self.current_flos = 0

    @contextmanager
    def _unmeasured(self) -> Iterator[None]:
        with self.throughput.paused(), self.profile.left_out():
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures to the lines of training; all ranks take part."""
        if "loss" in logs:
            logs = {**logs, **self._rates, **self.throughput.take(self.accelerator.gather)}
        super().log(logs, start_time)


class _StartOver(TrainerCallback):
    """Counts from the moment training begins: also where it begins again, with a smaller batch."""

    def __init__(self, start_over: Callable[[], None]) -> None:
        self._start_over = start_over

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, state, control, kwargs
        self._start_over()


def flops_of(model: Any) -> Flops:
    """Return what samples cost a model that is ready for training."""
    adapters = adapter_sizes(model)
    groups = parameter_modules(model)
    whole = {groups[name] for name, value in model.named_parameters() if value.requires_grad and trains_whole(name)}
    trained = Trained("vision" in whole, "merger" in whole, "language" in whole, adapters)
    return training_flops(model.config, get_family(model.config.model_type), trained)
