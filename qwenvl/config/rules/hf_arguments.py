"""State the support of each field of ``transformers.TrainingArguments``; the source of ``docs/training_arguments.md``.

A test fails for a field that is in none of the tables, so that a new release of transformers cannot add one unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenvl.utils.errors import UserError, nearest

WORKS: dict[str, str] = {
    **dict.fromkeys(
        (
            *("output_dir", "per_device_train_batch_size", "learning_rate", "weight_decay", "max_steps"),
            *("gradient_accumulation_steps", "max_grad_norm", "fp16", "bf16", "tf32", "logging_strategy"),
            *("logging_steps", "logging_first_step", "log_level", "log_level_replica", "disable_tqdm", "report_to"),
            *("eval_delay", "per_device_eval_batch_size", "save_only_model", "save_steps", "save_on_each_node"),
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_revision"),
            *("ignore_data_skip", "full_determinism", "seed", "use_cpu", "torch_empty_cache_steps", "debug"),
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_bucket_cap_mb"),
            *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "deepspeed"),
            *("skip_memory_metrics", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
        ),
        "",
    ),
    "num_train_epochs": "Above 0; `max_steps` comes first.",
    "lr_scheduler_type": "A warm-up with a schedule that has none (`constant`, plateaus, `greedy`) is refused.",
    "lr_scheduler_kwargs": "Tried on the schedule before anything is loaded.",
    "warmup_steps": "Below 1 a share of all steps; see `lr_scheduler_type`.",
    "optim": "Optimizers that group parameters themselves are refused, as are those with a missing package.",
    "optim_args": "Refused where the optimizer takes no such argument; `weight_decay` has a flag of its own.",
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), "Refused with an optimizer that does not have it."),
    "average_tokens_across_devices": "False: each rank divides by its own units, and all ranks have equal weight.",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "Evaluations compute in this type; weights stay as they are. With DeepSpeed it must be the type of training.",
    ),
    "gradient_checkpointing": "Also `language`, `vision` or `both`.",
    "gradient_checkpointing_kwargs": '`{"use_reentrant": false}`, which is the default; others are refused.',
    "activation_checkpointing": "The newer name of `gradient_checkpointing`.",
    "activation_checkpointing_kwargs": "The newer name of `gradient_checkpointing_kwargs`.",
    "torch_compile": "Compiles each layer of the language model separately; not with DeepSpeed or FSDP.",
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), "Switches `torch_compile` on."),
    "use_liger_kernel": "Only Liger's loss; the model stays stock.",
    "neftune_noise_alpha": "Refused with `data_flatten` and `data_packing`: its noise shrinks with the row's length.",
    "auto_find_batch_size": "Not with ZeRO-3.",
    "include_num_input_tokens_seen": "`non_padding` counts the tokens of usable samples.",
    **dict.fromkeys(
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "For the reporters that read it.",
    ),
    **dict.fromkeys(("eval_strategy", "eval_on_start"), "Need `eval_dataset_use` or `eval_ratio`."),
    "eval_steps": "Default: `save_steps`.",
    "save_strategy": "`best` needs an evaluation; its metric is the loss unless `metric_for_best_model` names another.",
    "save_total_limit": "1 or more.",
    "load_best_model_at_end": "",
    "metric_for_best_model": "With or without `eval_`, of all datasets or of one (`loss/NAME`); a name that no "
    "evaluation computes is refused.",
    "greater_is_better": "Default: false for losses and errors (`mae`, `rmse`), true for all others.",
    "data_seed": "Seed of the order, of sampled shares of datasets and of the held-out split. Default: 0.",
    "ddp_find_unused_parameters": "Not needed: every rank uses every part.",
    **dict.fromkeys(("fsdp", "fsdp_config"), "Only FSDP2."),
    "do_eval": "True needs `eval_strategy`, False must not have it.",
}
"""Fields that work as in transformers, with notes."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Reason why a field accepts only values that change nothing.

    Args:
        reason: Two sentences at most, for the message and the page.
        harmless: Accepted values, besides None.
    """

    reason: str
    harmless: tuple[Any, ...] = ()


_NO_LOGITS = "Evaluations here sum the loss, and keep no logits, inputs or labels."
_OWN_ORDER = (
    "Batches are made here, in an order that does not depend on the number of ranks and that a resumed run continues."
)

REFUSED: dict[str, Refusal] = {
    "label_smoothing_factor": Refusal("It is not supported: the loss is plain cross entropy.", (0.0,)),
    "optim_target_modules": Refusal("It is for GaLore and APOLLO, which are not supported."),
    "prediction_loss_only": Refusal(f"{_NO_LOGITS} Metrics of answers: --eval_generate.", (True,)),
    "eval_do_concat_batches": Refusal(_NO_LOGITS, (True,)),
    "eval_use_gather_object": Refusal(_NO_LOGITS, (False,)),
    "eval_accumulation_steps": Refusal(_NO_LOGITS),
    "include_for_metrics": Refusal(f"{_NO_LOGITS} Metrics of answers: --eval_generate.", ([],)),
    "batch_eval_metrics": Refusal(f"{_NO_LOGITS} Metrics of answers: --eval_generate.", (False,)),
    "label_names": Refusal("The labels are made here, from the answers.", (["labels"],)),
    "remove_unused_columns": Refusal("Samples are not columns of a table here.", (False,)),
    "use_cache": Refusal("Training has no use for a cache of keys and values.", (False,)),
    "liger_kernel_config": Refusal("--use_liger_kernel uses only the loss of Liger Kernel.", ({},)),
    "enable_jit_checkpoint": Refusal("SIGTERM and SIGUSR1 always save a checkpoint and end the run.", (False,)),
    "dataloader_in_order": Refusal(_OWN_ORDER, (True,)),
    "do_train": Refusal("This program trains. To evaluate: tools/evaluate.py; to try settings: --dry_run.", (True,)),
    "do_predict": Refusal("This program trains. For answers: tools/predict.py, tools/evaluate.py.", (False,)),
}

_ACCELERATOR_SETTINGS: dict[str, tuple[Any, ...]] = {
    "split_batches": (False,),
    "dispatch_batches": (None, False),
    "even_batches": (True,),
    "use_seedable_sampler": (True,),
    "non_blocking": (False,),
    "gradient_accumulation_kwargs": (None, {}),
    "use_configured_state": (False,),
}
"""Settings of ``accelerator_config``, and their values that change nothing."""

WARNED: dict[str, str] = {
    **dict.fromkeys(
        ("train_sampling_strategy", "length_column_name", "dataloader_drop_last"),
        "Every epoch holds each sample once, in a new order; see `group_by_cost`.",
    ),
}
"""Fields without effect, which the log reports."""

NO_DIFFERENCE: dict[str, str] = {
    "logging_nan_inf_filter": "Steps that are not finite are skipped, and never part of a logged loss.",
    "log_on_each_node": "Figures and messages always come from process 0 of the run.",
    "hub_always_push": "Every upload is waited for, so that none is left out.",
    "local_rank": "Read from the launcher's environment; old launchers pass the flag as well.",
    "parallelism_config": "Cannot be set here; other ways to ask for it are refused.",
}
"""Fields whose values make no difference, and why they cannot."""


def fates() -> Mapping[str, tuple[str, str]]:
    """Return the part of the table and the note for each field, in the order of names."""
    parts: dict[str, dict[str, str]] = {
        "works": WORKS,
        "refused": {
            **{name: refusal.reason for name, refusal in REFUSED.items()},
            "accelerator_config": f"{_OWN_ORDER} Equivalent values are accepted.",
        },
        "warned of": WARNED,
        "no difference": NO_DIFFERENCE,
    }
    found = {name: (part, note) for part, notes in parts.items() for name, note in notes.items()}
    return dict(sorted(found.items()))


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Refuse settings that would be accepted and ignored.

    Args:
        given: Values that the user set, by name.

    Raises:
        UserError: A field has a value without its effect.
    """
    for name, value in given.items():
        refusal = REFUSED.get(name)
        if refusal is not None and value is not None and value not in refusal.harmless:
            raise UserError(f"--{name} {value}: {refusal.reason} Leave it out.")


def refuse_accelerator_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of ``accelerator_config`` that would be ignored.

    Raises:
        UserError: One differs from accelerate's defaults, or is unknown to accelerate.
    """
    for name, value in settings.items():
        if name not in _ACCELERATOR_SETTINGS:
            options = ", ".join(_ACCELERATOR_SETTINGS)
            raise UserError(
                f"--accelerator_config: {name} is not one of {options}.{nearest(name, _ACCELERATOR_SETTINGS)}"
            )
        if value not in _ACCELERATOR_SETTINGS[name]:
            raise UserError(
                f"--accelerator_config: {name} {value} would have no effect. {_OWN_ORDER} Leave the setting out."
            )
