"""Advise on settings that do not exist: names of other trainers and of older versions, and misspelt ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qwenvl.config.parallelism import reason_against
from qwenvl.utils.errors import nearest

RENAMED = {
    "evaluation_strategy": "eval_strategy",  # transformers before 4.46
    "no_cuda": "use_cpu",
    "cutoff_len": "model_max_length",  # LLaMA-Factory, ms-swift, TRL
    "max_length": "model_max_length",
    "max_seq_length": "model_max_length",
    "dataset": "dataset_use",
    "model": "model_name_or_path",
    "lora_rank": "lora_r",
    "image_max_pixels": "max_pixels",
    "image_min_pixels": "min_pixels",
    "video_maxlen": "video_max_frames",
    "packing": "data_packing",
    "padding_free": "data_flatten",
    "neat_packing": "data_packing",
    "val_size": "eval_ratio",
    "split_dataset_ratio": "eval_ratio",
    "eval_dataset": "eval_dataset_use",
    "val_dataset": "eval_dataset_use",
    "vit_lr": "vision_tower_lr",
    "aligner_lr": "mm_projector_lr",
    "flash_attn": "attn_implementation",
    "attn_impl": "attn_implementation",
    "resume": "resume_from_checkpoint",
    "target_modules": "lora_target",
    "torch_dtype": "model_dtype",
}
"""Settings of older versions and other trainers, and the setting of this one."""

_TRAINED = "Here lora_enable trains adapters, and tune_mm_llm, tune_mm_mlp and tune_mm_vision train whole parts."
_OUR_TEMPLATE = "The checkpoint's own chat template is used: leave it out."
ADVICE = {
    "overwrite_output_dir": (
        "transformers 5 has it no more. Leave it out: the same command resumes a run; for a new one, name another "
        "output_dir."
    ),
    "stage": "This trainer does supervised fine-tuning: leave it out. --task chooses anything else.",
    "do_sft": "This trainer does supervised fine-tuning: leave it out.",
    "finetuning_type": _TRAINED,
    "train_type": _TRAINED,
    "tuner_type": _TRAINED,
    "freeze_vision_tower": "tune_mm_vision says the opposite.",
    "freeze_vit": "tune_mm_vision says the opposite.",
    "freeze_multi_modal_projector": "tune_mm_mlp says the opposite.",
    "freeze_aligner": "tune_mm_mlp says the opposite.",
    "freeze_language_model": "tune_mm_llm says the opposite.",
    "freeze_llm": "tune_mm_llm says the opposite.",
    "template": _OUR_TEMPLATE,
    "dataset_dir": "Register the files in data/__init__.py, or in a file of --dataset_registry.",
    "media_dir": "It is data_path in the dataset's registry entry.",
}
"""What to do about settings of others that have no counterpart of one name."""


def advise(name: str, known: Mapping[str, Any]) -> str:
    """Return advice on an unknown setting, with a space in front: why there is none, its name here, or similar names.

    Args:
        name: Name, with underscores.
        known: Settings by name.
    """
    if name in RENAMED:
        return f" It is {RENAMED[name]!r} here."
    reason = reason_against(name) or ADVICE.get(name, "")
    return f" {reason}" if reason else nearest(name, known)


def unknown_settings(names: Iterable[str], known: Mapping[str, Any]) -> str:
    """Return a sentence on each of the names that is not a setting, separated by spaces; empty if all are."""
    unknown = [(name, name.replace("-", "_")) for name in names]
    return " ".join(f"{name} is not a setting.{advise(plain, known)}" for name, plain in unknown if plain not in known)
