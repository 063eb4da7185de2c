"""Training flags: the fields of ``transformers.TrainingArguments`` and the fields that this trainer adds."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from transformers.training_args import OptimizerNames

from qwenvl.config.evaluation import EvaluationArguments
from qwenvl.config.export import ExportArguments
from qwenvl.config.rules.best_metric import greater_is_better
from qwenvl.config.rules.engines import check_deepspeed, check_fsdp, offloading_backend, read_settings
from qwenvl.config.rules.hf_arguments import refuse_accelerator_settings
from qwenvl.config.rules.limits import check_limits
from qwenvl.config.rules.reporters import choose_reporters
from qwenvl.utils.cores import available_cores
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)


def default_workers() -> int:
    """Return the number of loader processes of one rank: 4 as in the official scripts, fewer where cores are few."""
    return max(1, min(4, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def default_optimizer(*, use_cpu: bool) -> str:
    """Return the name of the optimizer of runs that name none."""
    return "adamw_torch_fused" if torch.cuda.is_available() and not use_cpu else "adamw_torch"


@dataclass
class TrainingArguments(EvaluationArguments, ExportArguments, transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with defaults for this trainer. Every field is explained by its ``help``.

    Raises:
        UserError: values contradict each other, are out of range, or need a package that is not installed.
    """

    # Flags of the official recipe.
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for downloaded checkpoints. Default: Hugging Face's own."}
    )
    model_max_length: int = field(
        default=8192,
        metadata={
            "help": "Most tokens of a sample, images included; see overlength for longer ones. The official default "
            "of 512 never reached its collator, so nothing was cut; here the limit holds, hence the larger default."
        },
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the mergers (tune_mm_mlp). Default: learning_rate."}
    )
    vision_tower_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision encoder (tune_mm_vision). Default: learning_rate."}
    )
    warmup_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the optimizer steps used for warm-up, 0 to 1. Not together with warmup_steps."},
    )

    # Own flags.
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: try everything that can fail later, and report tokens, packs, steps, operations, "
            "hours and the memory of each device. No GPU is needed."
        },
    )
    dry_run_devices: int = field(
        default=0, metadata={"help": "Number of devices that dry_run computes for; 0 for the devices of this machine."}
    )
    dry_run_mfu: float = field(
        default=0.4, metadata={"help": "Share of a device's peak that dry_run assumes for its hours, 0 to 1."}
    )
    max_bad_steps: int = field(
        default=10,
        metadata={
            "help": "Number of consecutive steps with a loss or gradient that is not finite after which the run ends. "
            "Each of them is skipped and reported with its samples."
        },
    )
    router_aux_loss_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the auxiliary loss that spreads tokens over the experts of a MoE; 0.001 is usual, 0 is "
            "none. It is computed per sample, so that it depends neither on packing nor on the split over ranks."
        },
    )
    activation_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the inputs of layers, which gradient_checkpointing needs for backward, in host memory. "
            "Saves device memory with long samples; costs the time of the copies."
        },
    )
    step_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds that an optimizer step, or one batch of an evaluation, may take, waiting for data "
            "included. After that every rank logs its step, samples and stack, and the run ends. 0 for no limit."
        },
    )
    device_peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Peak TFLOP/s of dense matrix products on one device in the precision of training, the reference "
            "for MFU. Default: the bfloat16 peak from the data sheet for known devices; otherwise no MFU is logged."
        },
    )
    log_sample_losses: bool = field(
        default=False,
        metadata={
            "help": "Keep the loss of each sample each time it is trained, from the forward pass that runs anyway, in "
            "sample_losses.parquet of the output folder. tools/rank_samples.py finds wrong labels by it."
        },
    )
    profile_steps: int = field(
        default=0,
        metadata={
            "help": "Number of optimizer steps of process 0 to profile, from the third on or earlier in a shorter run. "
            "profile/table.txt in the output folder, which is logged too, lists the time by operation; "
            "profile/trace.json.gz is for ui.perfetto.dev. 0 for none."
        },
    )

    # Fields of transformers with another default here.
    optim: OptimizerNames | str | None = field(
        default=None,
        metadata={
            "help": "Optimizer. Default: AdamW as in the official recipe; adamw_torch_fused on CUDA devices, which "
            "needs no temporary memory and a third of the traffic, adamw_torch elsewhere."
        },
    )
    report_to: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Where metrics go: tensorboard, wandb, trackio, swanlab, ...; several, all, or none. Default: "
            "tensorboard."
        },
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Optimizer steps between two log lines; below 1, a share of all steps."}
    )
    eval_steps: float | None = field(
        default=None,
        metadata={"help": "Optimizer steps between evaluations with eval_strategy steps. Default: save_steps."},
    )
    dataloader_num_workers: int = field(
        default_factory=default_workers,
        metadata={"help": "Processes of each rank that prepare samples. Default: 4, fewer where cores are few."},
    )
    gradient_checkpointing: bool | str | None = field(
        default=None,
        metadata={
            "help": "Keep only the inputs of layers and recompute the rest in the backward pass: true or both, "
            "language, vision, or false. A frozen vision tower keeps nothing anyway.",
            "const": True,
        },
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = field(
        default_factory=lambda: {"use_reentrant": False},  # the reentrant kind loses gradients of side outputs
        metadata={"help": "Leave as it is: checkpointing is not reentrant, and other arguments are an error."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave as it is: samples are not columns of a table here."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluation returns the loss only. Logits of a whole set would not fit."}
    )
    average_tokens_across_devices: bool = field(
        default=True,
        metadata={
            "help": "Divide the loss by the trained tokens of all ranks, so that the split over them does not matter."
        },
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={
            "help": "Compute the vocabulary projection and its loss by Liger Kernel (a CUDA device; pip install "
            "liger-kernel) instead of our own chunked loss. Nothing else of the model is replaced."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Without effect: steps that are skipped are not part of the logged loss; see max_bad_steps."},
    )
    ddp_timeout: int | None = field(
        default=None,
        metadata={
            "help": "Seconds that a rank may wait for another one in a collective operation. Default: step_timeout and "
            "half an hour, so that a hang is reported by step_timeout; a week without one. Saving, hashing and "
            "uploading by one rank are waited for without limit."
        },
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={
            "help": "Let DDP copy the buffers of rank 0 to the others before each forward pass. Not needed: they are "
            "constants."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Let DDP search for parameters without a gradient. Not needed: every rank uses every part."},
    )

    def __post_init__(self) -> None:
        check_limits(self)
        self.check_export()
        self._map_warmup_ratio()
        self._choose_evaluation_interval()
        self._choose_best()
        self._name_checkpointing()
        self._choose_device()
        if self.ddp_timeout is None:
            self.ddp_timeout = int(self.step_timeout) + 1800 if self.step_timeout else 7 * 24 * 3600
        if self.optim is None:  # a dry run counts for GPUs, wherever it runs
            self.optim = "adamw_torch_fused" if self.dry_run else default_optimizer(use_cpu=self.use_cpu)
        self.report_to = choose_reporters(self.report_to)
        refuse_accelerator_settings(read_settings(self.accelerator_config or {}, "accelerator_config"))
        check_fsdp(self)
        self.ddp_backend = self.ddp_backend or offloading_backend(self)
        if self.deepspeed:
            self.deepspeed = check_deepspeed(self)
        super().__post_init__()
        self._keep_to_one_device()

    def _map_warmup_ratio(self) -> None:
        """Hand the ratio to ``warmup_steps``, which transformers 5 reads as a ratio below 1."""
        if self.warmup_ratio is None:
            return
        if self.warmup_steps not in (0, self.warmup_ratio):
            raise UserError(
                f"--warmup_ratio {self.warmup_ratio:g} and --warmup_steps {self.warmup_steps:g} both set the warm-up: "
                "keep one."
            )
        self.warmup_steps = self.warmup_ratio

    def _choose_evaluation_interval(self) -> None:
        """Evaluate as often as checkpoints are saved; transformers' own choice, logging_steps, is every step here."""
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.save_steps

    def _choose_best(self) -> None:
        """Fill in the metric of the best checkpoint, by default the loss, and whether greater is better."""
        chooses = self.save_strategy == "best" or self.load_best_model_at_end
        named: Any = self.metric_for_best_model or ("loss" if chooses else None)
        if named is None and self.greater_is_better is not None:
            raise UserError("--greater_is_better has no effect without --metric_for_best_model. Leave it out.")
        if named is not None and self.greater_is_better is None:
            self.greater_is_better = greater_is_better(named)
        self.metric_for_best_model = named

    @property
    def checkpointed_parts(self) -> Literal["language", "vision", "both"] | None:
        """Part of the model with ``gradient_checkpointing``."""
        named: Any = self.gradient_checkpointing
        return "both" if named is True else named or None

    def _name_checkpointing(self) -> None:
        """Fill in ``use_reentrant`` and, where transformers has them, the newer names of gradient checkpointing."""
        if self.gradient_checkpointing not in (True, False, None, "language", "vision", "both"):
            value = self.gradient_checkpointing
            raise UserError(f"--gradient_checkpointing {value} is not one of true, false, language, vision, both.")
        older = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        _refuse_checkpointing_arguments("gradient_checkpointing_kwargs", older)
        self.gradient_checkpointing_kwargs = older
        if self.activation_offload and not (self.checkpointed_parts or getattr(self, "activation_checkpointing", None)):
            raise UserError(
                "--activation_offload without --gradient_checkpointing would copy every tensor of every layer to the "
                "host and back: add --gradient_checkpointing True, or leave it out."
            )
        if not hasattr(self, "activation_checkpointing"):  # transformers 5.19 and older
            return
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        elif self.gradient_checkpointing not in (None, self.activation_checkpointing):
            raise UserError(
                "--gradient_checkpointing and --activation_checkpointing are two names of one switch, and contradict "
                "each other: keep one."
            )
        _refuse_checkpointing_arguments("activation_checkpointing_kwargs", self.activation_checkpointing_kwargs or {})
        self.activation_checkpointing_kwargs = older

    def _choose_device(self) -> None:
        """Set ``use_cpu`` where there is no accelerator: without it, accelerate under torchrun sees one rank only."""
        if not self.use_cpu and not torch.accelerator.is_available():
            logger.info("No accelerator found: training on the CPU.")
            self.use_cpu = True
        if self.use_cpu and (self.fp16 or self.fp16_full_eval):
            raise UserError("--fp16 needs an accelerator; on the CPU use --bf16 True or leave both out (float32).")

    def _keep_to_one_device(self) -> None:
        """Use one device per process: ``nn.DataParallel`` would split batches that are not rows of a tensor."""
        if self._n_gpu > 1:
            logger.warning(
                "%d devices, one process: only the first is used. Start with torchrun --nproc_per_node=%d to use all.",
                self._n_gpu,
                self._n_gpu,
            )
            self._n_gpu = 1


def _refuse_checkpointing_arguments(flag: str, arguments: Any) -> None:
    """Refuse arguments without effect: this trainer sets up checkpointing itself, part by part.

    Raises:
        UserError: there is an argument other than ``use_reentrant: false``.
    """
    if arguments not in ({}, {"use_reentrant": False}):
        raise UserError(
            f"--{flag} {arguments}: checkpointing here is not reentrant, which would lose gradients of frozen and of "
            "deepstack parts, and takes no other arguments. Leave the flag out."
        )
