"""The saving and loading part of the Trainer: checkpoints are written atomically, and every weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PretrainedConfig, ProcessorMixin
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from qwenvl.config import TrainingArguments
from qwenvl.config.export import shard_bytes
from qwenvl.data.sampler import SampleOrder, Sharding
from qwenvl.models.loading import load_weights
from qwenvl.models.lora import files as adapter_files
from qwenvl.models.lora.adapters import has_adapters
from qwenvl.models.task_module import readout_of
from qwenvl.tasks import files as task_files
from qwenvl.train.checkpoint import float32_parts, trained_mtp
from qwenvl.train.checkpoint.carried_tensors import carried_tensors, carry_over
from qwenvl.train.checkpoint.folder import published, refused_state_named, write_records
from qwenvl.train.checkpoint.folder_check import Header, require_whole
from qwenvl.train.checkpoint.manifest import BackgroundHasher
from qwenvl.train.checkpoint.saved_types import SavedTypes
from qwenvl.train.checkpoint.sharding import fsdp_precision, shard_on_cpu, tie_gathered
from qwenvl.train.checkpoint.weight_files import rewrite_weights
from qwenvl.train.export.client_forms import write_client_forms
from qwenvl.train.export.hub import push_checkpoint, push_model
from qwenvl.train.export.model_card import Card
from qwenvl.train.resume.hyperparameters import Hyperparameters
from qwenvl.train.resume.sampler_state import SamplerPosition
from qwenvl.utils.distributed import wait_for_all

logger = logging.getLogger(__name__)

_ABSENT = object()


@dataclass(frozen=True)
class Records:
    """Records that are written next to the weights of every checkpoint.

    Args:
        settings_yaml: Recipe that reruns the job.
        original_limits: Pixel and frame limits of the starting checkpoint's processor.
        source: Tensors of the starting checkpoint; None if not known.
        serving: Template arguments of requests to a server, for ``serving.json``.
        data: Used rows of each dataset, for ``data.json``.
    """

    settings_yaml: str
    original_limits: Mapping[str, Any]
    source: Mapping[str, Header] | None = None
    serving: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[Mapping[str, Any]] = ()


class CheckpointingTrainer(transformers.Trainer):
    """A Trainer that saves self-contained folders.

    The processor is not passed to the stock Trainer, which would overwrite the special tokens of config and generation
    config by the tokenizer's.

    Args:
        order: Order of the training samples; the position in it is saved with every checkpoint.
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
        self._drafts: str | None = None  # folder of drafts while a checkpoint is written
        self.card: Card | None = None
        self._hasher = BackgroundHasher()
        self.forgets_best = False  # whether metrics of a resumed run are not comparable with earlier ones
        # gathered from all ranks, for the rank that writes
        self._of_task: Mapping[str, Tensor] = {}
        self._of_mtp: Mapping[str, Tensor] = {}
        self._in_float32: Mapping[str, Tensor] = {}

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and make ``--fsdp`` keep only shards of gradients, on CPUs too.

        Without ``sync_each_batch`` every rank would keep whole gradients, in float32, between the micro-batches of a
        step: 4 bytes per weight, 131 GB for 32B.
        """
        args = self.args
        if args.fsdp:
            args.fsdp_plugin_args["mixed_precision_policy"] = fsdp_precision(bf16=args.bf16, fp16=args.fp16)
            args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
        super().create_accelerator_and_postprocess()
        if self.accelerator.ddp_handler is not None:  # gradients are views of DDP's buckets, rather than copied to them
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self.args.fsdp and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    @property
    def sharding(self) -> Sharding:
        """This rank's share of the order."""
        size = self._train_batch_size  # the flag's, or a smaller one found by --auto_find_batch_size
        accumulation = self.args.gradient_accumulation_steps
        return Sharding(size, self.args.world_size, self.args.process_index, accumulation)

    def _init_training_state(
        self, max_steps: int, steps_of_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Start or restore the state of the run; return the epoch and the micro-batch in it to continue with.

        The path of the best checkpoint is updated, in case the output folder was moved.
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
        """Train an epoch, unless all steps are done: resumed inside an epoch, the Trainer would take an extra step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load all weights of the checkpoint to resume from.

        The stock Trainer matches names in the files with names in memory, which differ in some families (and the
        experts of Qwen3-VL-MoE are stored transposed), and silently continues with unmatched weights.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_trained(resume_from_checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule, and record the optimizer's settings before a checkpoint is loaded."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        self._hyperparameters = Hyperparameters.read(self.optimizer)
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer's moments and the schedule's position; learning rates and the like come from the flags."""
        with refused_state_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._hyperparameters.restore(self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with refused_state_named(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """Load all weights of the best checkpoint."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            logger.info("Loading the best checkpoint, %s.", self.state.best_model_checkpoint)
            self._load_trained(self.state.best_model_checkpoint)

    def _load_trained(self, folder: str) -> None:
        """Load the weights of a checkpoint of this run: the whole model or the adapters."""
        if has_adapters(self.model):
            adapter_files.load(self.model, folder)
        else:
            load_weights(self.model, folder)
        task_files.load(readout_of(self.model), folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights, config and processor to a folder; every rank must call it, and returns when they are written.

        With FSDP and ``SHARDED_STATE_DICT`` the stock Trainer would only save weights that nothing but a resumed run
        can open. With adapters, only saved weights are gathered, never the frozen ones.
        """
        self._of_task = task_files.collect(self.model)
        self._of_mtp = trained_mtp.collect(self.model)
        if self.is_deepspeed_enabled and not has_adapters(self.model):
            self._in_float32 = float32_parts.collect(self.model, self._records.source or {})
        if has_adapters(self.model):
            self._save(output_dir, state_dict=adapter_files.collect(self.model))
        elif self.is_fsdp_enabled:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        elif self.is_deepspeed_enabled and not self._shards_weights():
            # a copy of all weights, which the stock Trainer makes on every rank, whether it writes or not
            writes = self.args.should_save
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.deepspeed) if writes else None)
        else:
            super().save_model(output_dir, _internal_call=_internal_call)
        wait_for_all()  # or the others would wait in the next collective operation, which has a time limit

    def _shards_weights(self) -> bool:
        """Whether DeepSpeed shards weights, which only all ranks together can gather."""
        return int(self.accelerator.deepspeed_config["zero_optimization"]["stage"]) == 3

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the state of optimizer and schedule; with FSDP no rank starts on a part before the last one is on disk.

        One rank writes whole state dicts, which takes minutes for large models, and the others would wait for it in
        the collective operations that gather the next one.
        """
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, self.accelerator, self.model, output_dir, adapter_only=True)
        wait_for_all()
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        wait_for_all()

    def save_final(self, card: Card | None = None) -> None:
        """Save the finished model to the output folder itself, with a model card if one is given."""
        with published(self.args.output_dir, None, writes=self.args.should_save) as folder:
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                types, own = self.saved_types, self.model.dtype
                if types.asked == "auto" and types.usual(own) != own:
                    logger.info(
                        "Weights are saved in %s, as in the starting checkpoint, and rounded from %s once "
                        "(--save_dtype float32 keeps all digits, as checkpoints do).",
                        *(str(one).removeprefix("torch.") for one in (types.usual(own), own)),
                    )
                rewrite_weights(folder, types, shard_bytes(self.args.max_shard_size))
                self._carry_over(folder, types.usual(own))
        if self.args.should_save:
            require_whole(self.args.output_dir, self._records.source)
            self.card = card
            self.create_model_card()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")
        self._hasher.finish()
        wait_for_all()

    def create_model_card(self, **options: Any) -> None:
        """Write the README.md of the finished model, unless there is one by the user."""
        del options
        if self.card is not None and not self.card.write(Path(self.args.output_dir), self.state.log_history):
            logger.info("%s/README.md was not written by this trainer, and is kept.", self.args.output_dir)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None, **_: Any
    ) -> Any:
        """Upload the finished model in the output folder, without checkpoints and curves."""
        if self.is_world_process_zero():
            message = commit_message or "End of training"
            return push_model(Path(self.args.output_dir), self.hub_model_id, self.args, message, token=token)
        return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the stock Trainer pushes while it saves, before the checkpoint is at its final path."""

    def save_position(self, folder: Path) -> None:
        """Write the position in the data into a checkpoint; every rank must call it.

        Args:
            folder: Folder in which the checkpoint is being written.
        """
        if self.args.should_save:
            self.position.write(folder, self.sharding, self.state.global_step)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder in which the Trainer reads and writes checkpoints: the folder of drafts during a save."""
        return super()._get_output_dir(trial) if self._drafts is None else self._drafts

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint to a temporary folder, and move it to its final path when it is complete."""
        name = f"checkpoint-{self.state.global_step}"
        with published(self.args.output_dir, name, writes=self.args.should_save) as draft:
            self._drafts = str(draft.parent)
            try:
                super()._save_checkpoint(model, trial)
                self._name_best(being_saved=self.state.global_step)
                if self.args.should_save:
                    self._carry_over(draft, self.model.dtype)
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
            if self.args.checkpoint_hash == "full":
                self._hasher.add(Path(self.args.output_dir) / name)
        wait_for_all()

    @property
    def saved_types(self) -> SavedTypes:
        """Data types of the finished model's weights; adapters are saved as they are trained."""
        source = {} if has_adapters(self.model) else self._records.source or {}
        return SavedTypes(self.args.save_dtype, source)

    def _carry_over(self, folder: Path, dtype: torch.dtype) -> None:
        """Add the starting checkpoint's tensors that transformers does not load to the weights in a folder."""
        if not has_adapters(self.model):
            tensors = carried_tensors(self._records.source or {}, self.model)
            carry_over(folder, tensors, shard_bytes(self.args.max_shard_size), dtype)

    def _save_mtp(self, folder: Path) -> None:
        """Add the layer for multi-token prediction that was trained; a finished model's in the type of its weights.

        Trained alone, it is in float32 beside a model in half precision, and resumes from that.
        """
        finished = self._drafts is None and self.args.save_dtype == "auto"
        tensors = {name: value.to(self.model.dtype) if finished else value for name, value in self._of_mtp.items()}
        trained_mtp.save(folder, tensors, self._records.source or {}, shard_bytes(self.args.max_shard_size))

    def _name_best(self, being_saved: int | None = None) -> None:
        """Set the best checkpoint to its final path: the Trainer sets a path among the drafts.

        Args:
            being_saved: Step whose checkpoint is being written, and is not at its final path yet.
        """
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best.exists() or self.state.best_global_step == being_saved):
            self.state.best_model_checkpoint = str(best)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights, config and processor, and the records of the run."""
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            if has_adapters(self.model):
                assert state_dict is not None
                adapter_files.save(self.model, folder, state_dict)
            else:
                if state_dict is not None:
                    tie_gathered(self.model, state_dict)
                    state_dict = {**trained_mtp.without_mtp(task_files.without_task(state_dict)), **self._in_float32}
                super()._save(output_dir, state_dict=state_dict)
                self._save_mtp(Path(folder))
            task_files.save(self.model, folder, self._of_task)
            self._processor.save_pretrained(folder)
            write_client_forms(Path(folder))
            records = self._records
            write_records(folder, records.settings_yaml, records.original_limits, records.serving, records.data)


def _restore(config: PretrainedConfig, name: str, value: Any) -> None:
    """Restore a value that the Trainer changed in the config for training; saved, it would make inference slow."""
    if value is _ABSENT:
        vars(config).pop(name, None)
    else:
        setattr(config, name, value)
