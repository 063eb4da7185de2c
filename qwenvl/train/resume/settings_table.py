"""Table of the effects of each setting that differs between a resumed run and the run that saved its checkpoint.

:mod:`qwenvl.train.resume.settings` applies the table, and docs/resume.md shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["takes effect", "refused", "content decides", "no influence"]
"""Effect of a changed setting.

``takes effect``: from the checkpoint's step on, with a log message. ``refused``: the run stops before anything is
loaded. ``content decides``: its result, which is in the checkpoint, is compared instead of the setting. ``no
influence``: the new value applies, and trained weights do not depend on it, except for rounding.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """Settings with the same effect.

    Args:
        subject: Common subject of the settings, for messages.
        outcome: Effect of a change.
        settings: Names of the settings.
        reason: Reason or details; part of a sentence, for messages.
    """

    subject: str
    outcome: Outcome
    settings: tuple[str, ...]
    reason: str


def _row(subject: str, outcome: Outcome, reason: str, *settings: str) -> Row:
    return Row(subject, outcome, tuple(name for names in settings for name in names.split()), reason)


TABLE = (
    _row(
        "learning rates",
        "takes effect",
        "the schedule continues at its step with these peaks; refused with reduce_lr_on_plateau and greedy, whose "
        "rates depend on the run so far",
        "learning_rate vision_tower_lr mm_projector_lr head_lr",
    ),
    _row(
        "schedule",
        "takes effect",
        "from the next step on, the rates follow this schedule; refused if the old or the new one is "
        "reduce_lr_on_plateau or greedy",
        "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio",
    ),
    _row(
        "length",
        "takes effect",
        "the schedule is stretched to it, so that the rate may jump; a run that already has this many steps ends",
        "max_steps num_train_epochs",
    ),
    _row(
        "optimizer's settings",
        "takes effect",
        "moments and step counts stay those of the checkpoint",
        "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm",
    ),
    _row(
        "loss and noise",
        "takes effect",
        "",
        "lora_dropout neftune_noise_alpha router_aux_loss_coef average_tokens_across_devices",
        "task_loss class_weights focal_gamma huber_delta mtp_loss_weight",
    ),
    _row(
        "how samples are presented",
        "takes effect",
        "if rows are packed or grouped by cost, other lengths give another order, which is refused",
        "max_pixels min_pixels video_max_frames video_min_frames video_max_pixels video_min_pixels",
        "video_max_frame_pixels video_min_frame_pixels video_fps add_vision_id chat_template_kwargs",
        "history loss_on",
    ),
    _row(
        "which samples are left out",
        "takes effect",
        "as above",
        "model_max_length overlength on_bad_sample video_timeout allow_remote_media",
    ),
    _row(
        "what the best checkpoint is",
        "takes effect",
        "the best one so far is forgotten, since its metric is not comparable",
        "metric_for_best_model greater_is_better eval_dataset_use load_best_model_at_end",
    ),
    _row(
        "starting checkpoint",
        "takes effect",
        "the processor and, with adapters, the frozen weights are read from it: it must be the same checkpoint at "
        "another path",
        "model_name_or_path",
    ),
    _row(
        "position in the data",
        "takes effect",
        "the epoch restarts, with the order of the new settings, but only once: started again, the same command "
        "resumes at the position of its own checkpoints",
        "ignore_data_skip",
    ),
    _row(
        "trained parts",
        "refused",
        "the optimizer's state belongs to the parts that were trained",
        "tune_mm_llm tune_mm_mlp tune_mm_vision train_mtp",
    ),
    _row(
        "adapters",
        "refused",
        "their weights are valid with these settings only",
        "lora_enable lora_r lora_expert_r lora_alpha lora_target use_dora use_rslora quantization_bit",
    ),
    _row(
        "added tokens",
        "refused",
        "their rows are saved in this order",
        "additional_tokens",
    ),
    _row(
        "optimizer",
        "refused",
        "each optimizer has its own kind of state",
        "optim optim_args optim_target_modules",
    ),
    _row(
        "precision",
        "refused",
        "weights and the optimizer's state are saved in the precision of training",
        "model_dtype bf16 fp16",
    ),
    _row(
        "seed",
        "refused",
        "random number generators continue from the checkpoint; for another order, use data_seed with ignore_data_skip",
        "seed",
    ),
    _row(
        "order of the samples",
        "content decides",
        "refused if the rest of the epoch would differ (in samples, or in batch size x ranks x accumulation); with "
        "ignore_data_skip they take effect",
        "dataset_use dataset_registry eval_ratio data_flatten data_packing packing_plan group_by_cost data_seed",
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size",
    ),
    _row(
        "context",
        "content decides",
        "refused if positions would differ from the checkpoint's config",
        "rope_scaling rope_factor rope_native_length",
    ),
    _row(
        "task",
        "content decides",
        "refused if the module would differ from the checkpoint's task.json",
        "task hidden_layer pooling head class_names keep_answer",
        "mask_resolution mask_channels attention_merge sam_model_name_or_path",
    ),
    _row(
        "engine",
        "content decides",
        "refused if it cannot read the checkpoint's files: DeepSpeed, FSDP or neither; the kind of ZeRO stage (1 or 2, "
        "or 3); the kind of FSDP's state dict",
        "deepspeed fsdp fsdp_config",
    ),
    _row(
        "kernels, memory, devices",
        "no influence",
        "",
        "attn_implementation use_liger_kernel liger_kernel_config gradient_checkpointing gradient_checkpointing_kwargs",
        "activation_checkpointing activation_checkpointing_kwargs activation_offload torch_compile torch_compile_mode",
        "torch_compile_backend tf32 full_determinism use_cpu use_cache torch_empty_cache_steps ddp_bucket_cap_mb",
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout ddp_find_unused_parameters local_rank",
        "accelerator_config parallelism_config",
    ),
    _row(
        "loading of data",
        "no influence",
        "",
        "cache_dir data_cache_dir trust_remote_code dataloader_num_workers dataloader_pin_memory dataloader_in_order",
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context base_interval",
        "dataloader_drop_last train_sampling_strategy length_column_name remove_unused_columns label_names",
        "label_smoothing_factor",
    ),
    _row(
        "evaluation",
        "no influence",
        "",
        "do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_generate",
        "eval_generate_tokens eval_blind eval_accumulation_steps eval_do_concat_batches eval_use_gather_object",
        "bf16_full_eval fp16_full_eval include_for_metrics batch_eval_metrics prediction_loss_only",
    ),
    _row(
        "saving",
        "no influence",
        "",
        "output_dir save_strategy save_steps save_total_limit save_only_model save_on_each_node save_dtype",
        "max_shard_size checkpoint_hash save_processor_limits verify_export enable_jit_checkpoint push_to_hub",
        "hub_token hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision",
    ),
    _row(
        "logs",
        "no influence",
        "",
        "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level",
        "log_level_replica include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id",
        "trackio_bucket_id trackio_static_space_id device_peak_tflops profile_steps skip_memory_metrics debug",
        "log_sample_losses",
    ),
    _row(
        "control of the run",
        "no influence",
        "",
        "do_train dry_run dry_run_devices dry_run_mfu max_bad_steps step_timeout resume_from_checkpoint",
        "restore_callback_states_from_checkpoint",
    ),
)
"""Every field of the argument classes and of ``transformers.TrainingArguments``, in one row each."""


def row_of(setting: str) -> Row | None:
    """Return the row of a setting; None for a setting of a newer transformers that the table does not have."""
    return next((row for row in TABLE if setting in row.settings), None)


def as_markdown() -> Iterator[str]:
    """Yield the lines of the table for docs/resume.md."""
    yield "| what | settings | changed on resuming |"
    yield "|---|---|---|"
    for row in TABLE:
        names = ", ".join(f"`{name}`" for name in row.settings)
        yield f"| {row.subject} | {names} | **{row.outcome}**{': ' if row.reason else ''}{row.reason} |"
