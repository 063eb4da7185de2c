"""The part of the Trainer that saves and loads: a checkpoint is whole or absent, and every weight finds its place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PretrainedConfig, ProcessorMixin
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from qwenvl.config import TrainingArguments
from qwenvl.config.export import shard_bytes
from qwenvl.data.sampler import SampleOrder, Sharding
from qwenvl.models.loading import load_weights
from qwenvl.models.lora import files as adapter_files
from qwenvl.models.lora.adapters import has_adapters
from qwenvl.models.task_module import readout_of
from qwenvl.tasks import files as task_files
from qwenvl.train.checkpoint.carried_tensors import carried_tensors, carry_over
from qwenvl.train.checkpoint.folder import published, refused_state_named, write_records
from qwenvl.train.checkpoint.folder_check import Header
from qwenvl.train.checkpoint.sharding import shard_on_cpu, tie_gathered
from qwenvl.train.checkpoint.validate import require_whole
from qwenvl.train.checkpoint.weight_files import rewrite_weights
from qwenvl.train.export.client_forms import write_client_forms
from qwenvl.train.export.hub import push_checkpoint, push_model
from qwenvl.train.export.model_card import Card
from qwenvl.train.resume.hyperparameters import Hyperparameters
from qwenvl.train.resume.sampler_state import SamplerPosition

logger = logging.getLogger(__name__)

_ABSENT = object()


@dataclass(frozen=True)
class Records:
    """What is written beside the weights of every checkpoint.

    Args:
        settings_yaml: recipe that reruns the job.
        original_limits: pixel and frame limits of the checkpoint's processor before training.
        source: the tensors of that checkpoint; None where they are not known.
        serving: How a server has to be asked for what was trained; becomes ``serving.json``.
    """

    settings_yaml: str
    original_limits: Mapping[str, Any]
    source: Mapping[str, Header] | None = None
    serving: Mapping[str, Any] = field(default_factory=dict)


class CheckpointingTrainer(transformers.Trainer):
    """A Trainer that saves folders which load alone.

    The processor stays out of the stock Trainer's hands: it would write the tokenizer's special tokens over those that
    the checkpoint's config and generation config declare.

    Args:
        order: Order in which samples are trained on, whose position is saved with every checkpoint.
        processor: Processor that is saved with every checkpoint.
        records: Records that are saved with every checkpoint.
        options: Options of the stock Trainer.
    """

    args: TrainingArguments

    def __init__(self, order: SampleOrder, processor: ProcessorMixin, records: Records, **options: Any) -> None:
        config = options["model"].config
        use_cache = vars(config).get("use_cache", _ABSENT)
        super().__init__(**options)
        _restore(config, "use_cache", use_cache)
        self._order = order
        self.position = SamplerPosition(order, self.train_dataset.content, self.args)
        self._processor = processor
        self._records = records
        self._drafts: str | None = None  # where a checkpoint is written, while one is
        self.card: Card | None = None
        self.forgets_best = False  # a resumed run: whether figures of the earlier one do not compare with its own
        self._of_task: Mapping[str, Tensor] = {}  # gathered from all ranks, for the one that writes

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and have it shard the model on CPUs too where ``--fsdp`` asks for it."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    @property
    def sharding(self) -> Sharding:
        """Part of the order that is this rank's."""
        size = self._train_batch_size  # that of the flag, or a smaller one found by --auto_find_batch_size
        accumulation = self.args.gradient_accumulation_steps
        return Sharding(size, self.args.world_size, self.args.process_index, accumulation)

    def _init_training_state(
        self, max_steps: int, steps_of_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Start or take up the state of the run, and return the epoch and its micro-batch to go on with.

        The best checkpoint is found where the output folder is now.
        """
        begin: tuple[int, int] = super()._init_training_state(max_steps, steps_of_epoch, epochs, checkpoint, trial)
        # a checkpoint's state holds the intervals and the batch size of the run that saved it
        self.state.compute_steps(self.args, self.state.max_steps)
        self.state.train_batch_size = self._train_batch_size
        if self.forgets_best:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self._name_best()
        return (
            begin if checkpoint is None else self.position.take_up(checkpoint, self.state.global_step, steps_of_epoch)
        )

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Train an epoch, unless a run is resumed at its end: inside an epoch, the Trainer would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights to resume with, every one of them.

        The Trainer matches the names in the files with those in memory, which differ in some families (and the
        experts of Qwen3-VL-MoE are stored transposed), and goes on with what it could not match.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_trained(resume_from_checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule; the optimizer has the settings of the flags now, and none of a checkpoint's."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        self._hyperparameters = Hyperparameters.read(self.optimizer)
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's moments and where the schedule stands; rates and the like are those of the flags."""
        with refused_state_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._hyperparameters.restore(self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with refused_state_named(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """Load the weights of the best checkpoint, in the same way."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            logger.info("Loading the best checkpoint, %s.", self.state.best_model_checkpoint)
            self._load_trained(self.state.best_model_checkpoint)

    def _load_trained(self, folder: str) -> None:
        """Load the weights of a checkpoint of this run, all of them or the adapters."""
        if has_adapters(self.model):
            adapter_files.load(self.model, folder)
        else:
            load_weights(self.model, folder)
        task_files.load(readout_of(self.model), folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights, config and processor to a folder; every rank calls it.

        Under FSDP the stock Trainer would save no weights beside those of ``SHARDED_STATE_DICT``, which nothing but a
        resumed run opens. Of adapters, only what is saved is gathered, never the frozen weights.
        """
        self._of_task = task_files.collect(self.model)
        if has_adapters(self.model):
            self._save(output_dir, state_dict=adapter_files.collect(self.model))
        elif self.is_fsdp_enabled:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call=_internal_call)

    def save_final(self, card: Card | None = None) -> None:
        """Save the finished model to the output folder itself, with a model card if one is given."""
        with published(self.args.output_dir, None, writes=self.args.should_save) as folder:
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                rewrite_weights(folder, self.args.save_dtype, shard_bytes(self.args.max_shard_size))
                self._carry_over(folder)
        if self.args.should_save:
            require_whole(self.args.output_dir, self._records.source)
            self.card = card
            self.create_model_card()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, **options: Any) -> None:
        """Write the README.md of the finished model, unless a person has put one there."""
        del options
        if self.card is not None and not self.card.write(Path(self.args.output_dir), self.state.log_history):
            logger.info("%s/README.md is not this trainer's, and stays as it is.", self.args.output_dir)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None, **_: Any
    ) -> Any:
        """Upload the finished model, which is in the output folder, without checkpoints and curves."""
        if self.is_world_process_zero():
            message = commit_message or "End of training"
            return push_model(Path(self.args.output_dir), self.hub_model_id, self.args, message, token=token)
        return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: the stock Trainer pushes while it saves, when a checkpoint has not got its name."""

    def save_position(self, folder: Path) -> None:
        """Write what a checkpoint says of the data, for the run that resumes from it; every rank calls it.

        Args:
            folder: Folder in which the checkpoint is being written.
        """
        if self.args.should_save:
            self.position.write(folder, self.sharding, self.state.global_step)

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer looks for and writes checkpoints: during a save, the folder of drafts."""
        return super()._get_output_dir(trial) if self._drafts is None else self._drafts

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint under another name, and give it its own when it is whole."""
        name = f"checkpoint-{self.state.global_step}"
        with published(self.args.output_dir, name, writes=self.args.should_save) as draft:
            self._drafts = str(draft.parent)
            try:
                super()._save_checkpoint(model, trial)
                self._name_best(being_saved=self.state.global_step)
                if self.args.should_save:
                    self._carry_over(draft)
                    self.state.save_to_json(str(draft / TRAINER_STATE_NAME))
                self.save_position(draft)
            finally:
                self._drafts = None
        if self.args.should_save:
            require_whole(str(Path(self.args.output_dir) / name), self._records.source)
            if self.args.push_to_hub and self.is_world_process_zero():
                push_checkpoint(Path(self.args.output_dir) / name, self.hub_model_id, self.args)
            rotate_checkpoints(
                self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _carry_over(self, folder: Path) -> None:
        """Add what the starting checkpoint holds and transformers does not load to the weights in a folder."""
        if not has_adapters(self.model):
            tensors = carried_tensors(self._records.source or {}, self.model)
            carry_over(folder, tensors, shard_bytes(self.args.max_shard_size))

    def _name_best(self, being_saved: int | None = None) -> None:
        """Name the best checkpoint by its place in the output folder: the Trainer looks for it among the drafts.

        Args:
            being_saved: Step whose checkpoint is being written, and is not in its place yet.
        """
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best.exists() or self.state.best_global_step == being_saved):
            self.state.best_model_checkpoint = str(best)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights, config and processor, and the records that make the folder repeatable."""
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            if has_adapters(self.model):
                assert state_dict is not None
                adapter_files.save(self.model, folder, state_dict)
            else:
                if state_dict is not None:
                    tie_gathered(self.model, state_dict)
                    state_dict = task_files.without_task(state_dict)
                super()._save(output_dir, state_dict=state_dict)
            task_files.save(self.model, folder, self._of_task)
            self._processor.save_pretrained(folder)
            write_client_forms(Path(folder))
            write_records(folder, self._records.settings_yaml, self._records.original_limits, self._records.serving)


def _restore(config: PretrainedConfig, name: str, value: Any) -> None:
    """Undo what the Trainer did to a config for training: saved, it would make inference slow."""
    if value is _ABSENT:
        vars(config).pop(name, None)
    else:
        setattr(config, name, value)
