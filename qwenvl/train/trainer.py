"""Subclass of the Hugging Face Trainer with our batches, loss and checkpoints.

An :class:`~qwenvl.tasks.objective.Objective` defines the loss, which is divided by the number of units in the whole
optimizer step. In language modelling the units are trained tokens, weighted if answers have weights.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput

from qwenvl.config import TrainingArguments
from qwenvl.data.collator import Collator
from qwenvl.data.sample_stats import MEASURES
from qwenvl.data.sampler import SampleOrder, Sharding
from qwenvl.evaluate.answer_log import AnswerLog
from qwenvl.models.loss.causal_lm import Balance, count_tokens
from qwenvl.models.parts import output_head, vision_tower
from qwenvl.models.trainable.activation_offload import kept_on_host
from qwenvl.models.trainable.param_groups import parameter_groups
from qwenvl.models.vision.grid_inputs import grid_describer
from qwenvl.profiling.profiler import Phase
from qwenvl.profiling.throughput import measure_batch
from qwenvl.tasks.objective import Objective, batch_loss, losses_of_samples
from qwenvl.train.callbacks.freeze_unused_vision import UnusedVision
from qwenvl.train.callbacks.generation_eval import GenerationEval
from qwenvl.train.callbacks.learning_rates import LearningRates
from qwenvl.train.callbacks.nonfinite_guard import FirstStep, StepGuard
from qwenvl.train.callbacks.preemption import EvaluationStoppedError, StopRequest
from qwenvl.train.callbacks.progress import follow
from qwenvl.train.callbacks.speed_monitor import SpeedMonitor
from qwenvl.train.callbacks.watchdog import Watchdog
from qwenvl.train.checkpointing_trainer import CheckpointingTrainer, Records
from qwenvl.train.dataloader import PreparingCollator, build_loader
from qwenvl.train.dataset_losses import DatasetLosses, by_dataset, dataset_names
from qwenvl.train.eval_prompts import EvalPrompts
from qwenvl.train.records.sample_losses import SampleLosses
from qwenvl.train.records.skipped_samples import DataReport
from qwenvl.train.running_loss import RunningLoss
from qwenvl.utils.distributed import gather_objects, zeros_for_sums
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)


class Trainer(CheckpointingTrainer):
    """Trains on conversations; the loss is the mean over the objective's units in the whole optimizer step.

    Args:
        order: Order of the training samples.
        collator: Collator of batches.
        processor: Processor that is saved with every checkpoint.
        records: Records that are saved with every checkpoint.
        objective: Objective of the training; None for language modelling, whose units are trained tokens.
        prompts: Samples that the model answers at evaluations; None to evaluate the loss only.
        options: Options of the stock Trainer: the model, with frozen and trainable parts set and the vision call
            installed; training arguments; training samples, and evaluation samples or None.
    """

    args: TrainingArguments

    def __init__(
        self,
        *,
        order: SampleOrder,
        collator: Collator,
        processor: ProcessorMixin,
        records: Records,
        objective: Objective | None = None,
        prompts: EvalPrompts | None = None,
        **options: Any,
    ) -> None:
        super().__init__(order, processor, records, data_collator=collator, **options)
        self.objective = objective or Objective()
        self.model_accepts_loss_kwargs = True  # our loss is already divided by the units of all accumulation steps
        args, output_dir = self.args, Path(self.args.output_dir)
        self.data_report = DataReport(args.output_dir)
        self.stop_request = StopRequest()
        self.speed = SpeedMonitor(self.model, args)
        follow(self)
        self._unused_vision = UnusedVision()
        self._watchdog = Watchdog(args.step_timeout)
        for callback in (self.stop_request, self._unused_vision, self._watchdog, self.speed, self.speed.profile):
            self.add_callback(callback)
        self.answers = AnswerLog(output_dir)
        self._generation_eval = GenerationEval(prompts, self.answers, self._watchdog) if prompts else None
        self._learning_rates = LearningRates(args.learning_rate)
        self.running_loss = RunningLoss(args.device, tuple(self.objective.apart))
        self.sample_losses = SampleLosses(args.output_dir, args.log_sample_losses)
        self.dataset_losses = DatasetLosses(dataset_names(self.train_dataset), self.objective.unit, args.device)
        self._apart: dict[str, Tensor] = {}  # losses of the current micro-batch that are logged by themselves
        self._step_guard = StepGuard(args.max_bad_steps)
        self._samples: list[str] = []  # origins of the current step's samples
        self._units = 0.0  # units of the current step, which divide its loss
        self._tokens = 0.0  # tokens of the current step, over all ranks
        self._first_step: FirstStep | None = FirstStep(self.model, self.objective.unit)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's training batches."""
        return build_loader(self.train_dataset, self._batch_maker(), self.args, self._order, self.sharding)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this rank's evaluation batches."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sharding = Sharding(self.args.eval_batch_size, self.args.world_size, self.args.process_index)
        order = SampleOrder(len(dataset), shuffle=False)
        return build_loader(dataset, self._batch_maker(), self.args, order, sharding)

    def _batch_maker(self) -> PreparingCollator:
        """Return what makes batches in the loader's process."""
        tower = vision_tower(self.model)
        merge_size: int = tower.config.spatial_merge_size
        return PreparingCollator(self.data_collator, self.objective, grid_describer(tower), merge_size)

    def _prepare_input(self, data: Any) -> Any:
        """Copy inputs to the device, from the pinned memory of the loader without waiting for earlier work."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def save_position(self, folder: Path) -> None:
        """Write the position in the data, the description of their order, and the loss that is not logged yet."""
        self.running_loss.save(folder, writes=self.args.should_save)
        self.dataset_losses.save(folder, self._sum_over_ranks, writes=self.args.should_save)
        super().save_position(folder)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Start or restore the state of the run, also when ``--auto_find_batch_size`` restarts it."""
        self.running_loss.start_over()
        self.dataset_losses.start_over()
        self.sample_losses.start_over()
        self.current_flos = 0
        return super()._init_training_state(*args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, without time limit; the time does not count as training."""
        self._watchdog.rest()
        with self.speed.paused():
            self.sample_losses.write()
            super()._save_checkpoint(model, trial)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with the watchdog on."""
        with self._watchdog.on_duty():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, with the watchdog on; the time does not count as training."""
        with self._watchdog.on_duty(), self.speed.paused():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """Collect the micro-batches of an optimizer step and count their units over all ranks.

        With ``--average_tokens_across_devices False`` the count is this rank's own.

        Raises:
            SampleError: One of them holds a sample that must stop the run.
        """
        self._watchdog.watch(f"step {self.state.global_step + 1}, waiting for its samples")
        batches, here_units = super().get_batch_samples(self.speed.watch(epoch_iterator), num_batches, device)
        here = (
            any("media" in batch for batch in batches),
            self.stop_request.received,
            sum(count_tokens(batch) for batch in batches),
            here_units,
        )
        with_media, stop, self._tokens, units = self._over_ranks(*here)
        self._units = units if self.args.average_tokens_across_devices else here_units
        self._unused_vision.begin_step(self.optimizer, has_media=with_media > 0)
        self.stop_request.begin_step(agreed=stop > 0)
        for batch in batches:
            origins = batch.pop("origins")
            self.dataset_losses.count(batch, origins)
            self.sample_losses.count(batch, origins)
        self.speed.count(batches)
        return batches, self._units

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Check the batches of a step, and return this rank's units; the caller then waits for the other ranks."""
        del device
        for batch in batch_samples:
            self._receive(batch)
        self._samples = [str(origin) for batch in batch_samples for origin in batch["origins"]]
        shapes = [(tuple(batch["input_ids"].shape), batch.get("media", ())) for batch in batch_samples]
        lines = "".join(f"\n  {sample}" for sample in self._samples)
        self._watchdog.watch(f"step {self.state.global_step + 1}, batches of {shapes}, with the samples{lines}")
        return sum(batch["total_weight"] for batch in batch_samples)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return this micro-batch's part of the loss of the optimizer step.

        That is the weighted sum of the loss over its units / total weight of the units in the step, over all ranks and
        accumulation steps; times the number of ranks, because DDP, DeepSpeed and FSDP average gradients over ranks.
        With ``--average_tokens_across_devices False`` each rank divides by its own units, and ranks have equal weight.
        """
        assert not return_outputs and num_items_in_batch is not None
        # A step in which every sample was skipped has no units: its loss is zero, not NaN.
        units = float(num_items_in_batch) or 1.0
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss, output = batch_loss(self.objective, model, inputs, units=units, balance=self._balance(ranks))
        if not self.args.use_liger_kernel:  # whose kernel tells no losses of tokens
            losses = losses_of_samples(output, inputs)
            self.dataset_losses.add(losses, inputs)
            self.sample_losses.add(losses)
        self._apart = {name: part * (ranks / units) for name, part in self.objective.losses_apart(output).items()}
        self.speed.profile.enter(Phase.BACKWARD)
        return loss * ranks

    def _balance(self, ranks: int) -> Balance | None:
        """Return the settings of the experts' auxiliary loss in this step; None without one."""
        coefficient = self.args.router_aux_loss_coef
        if not coefficient:
            return None
        top_k: int = self.model.config.get_text_config().num_experts_per_tok
        # if each rank divides by its own units, ranks have equal weight, also in this loss
        share = ranks / self.accelerator.num_processes
        return Balance(coefficient, top_k, max(self._tokens * share, 1.0))

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Return a context that sets precision and activation offloading.

        Evaluations compute in the type of ``--bf16_full_eval`` or ``--fp16_full_eval``; weights are not converted.
        """
        contexts = ExitStack()
        contexts.enter_context(super().compute_loss_context_manager())
        dtype = torch.bfloat16 if self.args.bf16_full_eval else torch.float16 if self.args.fp16_full_eval else None
        if dtype is not None and not self.model.training:
            contexts.enter_context(torch.autocast(self.args.device.type, dtype))
        if self.args.activation_offload:
            pin = self.args.device.type == "cuda"
            contexts.enter_context(kept_on_host(self.model, output_head(self.model), pin_memory=pin))
        return contexts

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch; the optimizer follows after the last one of a step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        weighted = sum(self.objective.apart[name] * part for name, part in self._apart.items())
        self.running_loss.add(loss - weighted, self._apart)
        self.speed.profile.enter(Phase.OPTIMIZER if self.accelerator.sync_gradients else Phase.OTHER)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the step's gradient, and prevent a non-finite gradient from changing weights.

        The Trainer calls it right before the optimizer's step, which DeepSpeed has already taken, or skipped itself.

        Raises:
            UserError: The first step fails its checks, too many consecutive steps are skipped, or DeepSpeed took a step
                with a non-finite loss.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, step = self.running_loss.of_step, self.state.global_step + 1
        if self._first_step is not None:
            mean = self.accelerator.reduce(loss, reduction="mean").item()
            self._first_step.check(mean, self._units)
            self._first_step = None
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if self.is_deepspeed_enabled:
            taken = not self.accelerator.optimizer_step_was_skipped
            if taken and not loss.isfinite():
                raise UserError(
                    f"DeepSpeed took step {step}, whose loss is {loss.item()}: the weights are lost, and the newest "
                    'checkpoint is from before. Train in bf16, with "check_grad_overflow" true in its configuration.'
                )
        else:
            taken = math.isfinite(value)
            if not taken:
                model.zero_grad()  # optimizers skip parameters without a gradient
        if taken:
            self._step_guard.taken()
        elif (
            not self.args.fp16 or self._over_ranks(not bool(loss.isfinite()))[0]
        ):  # fp16 adjusts its scale by such steps
            self._step_guard.skipped(step, loss.item(), value, self._samples)
        self.running_loss.end_step(taken=taken)
        self.dataset_losses.end_step(taken=taken)
        self.sample_losses.end_step(step, int(self.state.epoch or 0), taken=taken)
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with a learning rate per module group, and no weight decay on biases and norms.

        Raises:
            UserError: The package for ``--optim`` is missing.
        """
        if self.optimizer is None:
            try:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            except ImportError as error:
                raise UserError(f"--optim {self.args.optim}: {error}") from error
            self.optimizer = optimizer_class(
                parameter_groups(
                    self.model,
                    learning_rate=self.args.learning_rate,
                    weight_decay=self.args.weight_decay,
                    mm_projector_lr=self.args.mm_projector_lr,
                    vision_tower_lr=self.args.vision_tower_lr,
                ),
                **options,
            )
        self._learning_rates.begin(self.optimizer)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """Return the learning rate of the run, for the log."""
        return self._learning_rates.read(self.optimizer)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a micro-batch, which are summed up in ``total_flos``."""
        return int(self.speed.flops.count(np.array(measure_batch(inputs), MEASURES)))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of usable samples for ``non_padding``, flattened or not; else like the stock Trainer."""
        if self.args.include_num_input_tokens_seen != "non_padding":
            super()._track_num_input_tokens(inputs)
            return
        tokens = torch.tensor(count_tokens(inputs), device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the loss per unit of the whole evaluation set, and the metrics of the objective and of answers."""
        del description, prediction_loss_only, ignore_keys
        model = self._wrap_model(self.model, training=False)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        apart = tuple(self.objective.apart)
        totals, records = zeros_for_sums(3 + len(apart), self.args.device), list[tuple[str, Any]]()
        names = dataset_names(getattr(dataloader, "dataset", None))
        losses = DatasetLosses(names, self.objective.unit, self.args.device)
        for batch in dataloader:
            self.leave_if_asked_to_stop()
            self._receive(batch)
            totals[1] += batch["total_weight"]
            totals[2] += batch["num_units"]
            origins = batch.pop("origins")
            losses.count(batch, origins)
            datasets = [origins[place].dataset for place in batch["sample_of_unit"].tolist()]
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, output = batch_loss(self.objective, model, inputs, units=1.0)
            totals[0] += loss
            losses.add(losses_of_samples(output, inputs), inputs)
            parts = self.objective.losses_apart(output)
            for place, name in enumerate(apart, 3):
                totals[place] += parts[name]
            records += zip(datasets, self.objective.records(output, inputs), strict=False)  # no or all units
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        losses.end_step(taken=True)
        loss_sum, weight, units, *sums = self._sum_over_ranks(totals).tolist()
        records = list(itertools.chain(*gather_objects(records)))
        of_all = [record for _, record in records]
        if self.is_world_process_zero():
            self.objective.draw(of_all, Path(self.args.output_dir))
        found = {
            "loss": loss_sum / weight if weight else math.nan,  # 0 would count as the best loss
            self.objective.unit: int(units),
            **{name: total / weight if weight else math.nan for name, total in zip(apart, sums, strict=True)},
            **self.objective.metrics(of_all),
            **(self._generation_eval.run(self) if self._generation_eval else {}),
            **losses.take(self._sum_over_ranks),
            **by_dataset(records, self.objective.metrics),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(
            predictions=(), label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )

    def leave_if_asked_to_stop(self) -> None:
        """Leave an evaluation during training once any rank has received a signal; every rank must call it.

        Raises:
            EvaluationStoppedError: One has.
        """
        if self.is_in_train and self._over_ranks(self.stop_request.received)[0]:
            raise EvaluationStoppedError

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, evaluate and save; a signal during the evaluation, which may take hours, leads straight to saving."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStoppedError:
            self.stop_request.leave_evaluation(self.args, self.state, self.control)
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures, with the mean loss over the steps taken and the speed; every rank must call it."""
        mean = partial(self.accelerator.reduce, reduction="mean")
        if "loss" in logs:
            figures = self.speed.throughput.take(self.accelerator.gather)
            logs = {**logs, **self._learning_rates.of_parts, **figures, **self.running_loss.take(mean)}
            logs |= self.dataset_losses.take(self._sum_over_ranks)
            self.sample_losses.collect()
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self.running_loss.of_run(mean)}
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def _over_ranks(self, *numbers: float) -> list[float]:
        """Return the sums over the ranks; of a bool, the number of ranks with True. Every rank must call it."""
        if self.args.world_size == 1:
            return [float(number) for number in numbers]  # without waiting for the device
        sums = zeros_for_sums(len(numbers), self.args.device)
        sums += torch.tensor([float(number) for number in numbers], dtype=sums.dtype, device=sums.device)
        found: list[float] = self._sum_over_ranks(sums).tolist()
        return found

    def _receive(self, batch: dict[str, Any]) -> None:
        """Remove the events and the error of a batch.

        Raises:
            SampleError: A sample of the batch must stop the run.
        """
        self.data_report.add(batch.pop("events"))
        error = batch.pop("error")
        if error is not None:
            raise error
