"""Check settings files of DeepSpeed and FSDP against the flags, before anything is loaded.

transformers compares a DeepSpeed file with the flags only after the model and the data are loaded, and ignores unknown
keys of an FSDP configuration.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qwenvl.utils.distributed import world_size
from qwenvl.utils.errors import UserError, nearest

logger = logging.getLogger(__name__)

_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_FSDP_KEYS = {
    *("version", "reshard_after_forward", "cpu_offload", "activation_checkpointing", "cpu_ram_efficient_loading"),
    *("state_dict_type", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"),
}
_STATE_DICT_TYPES = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
_ABSENT = object()


def read_settings(value: Mapping[str, Any] | str, flag: str) -> dict[str, Any]:
    """Return the settings of a flag, which are its value or in the JSON file that it names.

    Args:
        value: Path of the file, or the settings.
        flag: Name of the flag without dashes.

    Raises:
        UserError: the file cannot be read, is not JSON (with the line), or is not a mapping.
    """
    if not isinstance(value, str):
        return dict(value)
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"--{flag} {value}, line {error.lineno}: not valid JSON: {error.msg}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {value} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--{flag} {value}: expected a mapping in braces, found a {type(content).__name__}.")
    return content


def check_deepspeed(training: TrainingArguments) -> dict[str, Any] | str:
    """Check a DeepSpeed configuration against the flags and the installed version.

    Sections ``optimizer`` and ``scheduler`` that agree with the flags are left out: with them, DeepSpeed would make its
    own, with one learning rate for all parts of the model.

    Args:
        training: Training arguments as the user set them, before transformers completes them.

    Returns:
        Value for ``training.deepspeed``.

    Raises:
        UserError: the configuration is wrong; the message has all its problems.
    """
    assert training.deepspeed is not None
    config = read_settings(training.deepspeed, "deepspeed")
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = ""  # transformers reports that it is missing
    problems = [
        *_stage_problems(config, version),
        *_unsupported(config, training),
        *_conflicts(config, training, world_size()),
    ]
    if problems:
        name = training.deepspeed if isinstance(training.deepspeed, str) else "settings"
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(
            f"--deepspeed {name} cannot be trained with:{lines}\n"
            'Where the file and a flag differ: write "auto" in the file to use the flag, or change the flag.'
        )
    own = {"optimizer", "scheduler"} & config.keys()
    if not own:
        return training.deepspeed
    logger.info("The DeepSpeed file's %s agrees with the flags, which are used.", " and ".join(sorted(own)))
    return {name: section for name, section in config.items() if name not in own}


def overlap_problem(zero: Mapping[str, Any], version: str) -> str | None:
    """Return why a DeepSpeed version must not overlap communication, or None.

    Args:
        zero: Section ``zero_optimization``.
        version: Version of DeepSpeed; empty where it is unknown.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if zero.get("overlap_comm") is not True or zero.get("stage") not in (1, 2) or numbers is None:
        return None
    if tuple(map(int, numbers.groups())) >= (0, 19):
        return None
    return (
        f"zero_optimization.overlap_comm: true with stage {zero['stage']} corrupts gradients in DeepSpeed {version} (a "
        "loss of 0 or NaN after the first steps). Install DeepSpeed 0.19 or newer, or write false."
    )


def _stage_problems(config: Mapping[str, Any], version: str) -> Iterator[str]:
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping) or zero.get("stage") not in (0, 1, 2, 3):
        yield 'zero_optimization: there is no stage. Write "zero_optimization": {"stage": 2}, or 1 or 3.'
        return
    if zero["stage"] == 1 and _look_up(config, "data_types.grad_accum_dtype") == "fp32":
        yield (
            "data_types.grad_accum_dtype: fp32 with stage 1, for which DeepSpeed takes another optimizer in bf16, with "
            "checkpoints of another form. Leave it out, or use stage 2."
        )
    if zero["stage"] == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        yield (
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: must be true: otherwise the saved weights "
            "could only be used to resume the run."
        )
    problem = overlap_problem(zero, version)
    if problem:
        yield problem


def _unsupported(config: Mapping[str, Any], training: TrainingArguments) -> Iterator[str]:
    """Yield problems of flags that transformers refuses with DeepSpeed only after loading, or interprets otherwise."""
    if training.auto_find_batch_size and _look_up(config, "zero_optimization.stage") == 3:
        yield "--auto_find_batch_size: not with stage 3. Choose a batch size, or stage 2."
    if training.save_only_model and training.load_best_model_at_end:
        yield "--save_only_model with --load_best_model_at_end: the best checkpoint could not be loaded. Keep one."
    for kind in ("bf16", "fp16"):
        if getattr(training, f"{kind}_full_eval") and not getattr(training, kind):
            yield f"--{kind}_full_eval without --{kind}: DeepSpeed would train in it too. Set both, or none."


def _conflicts(config: Mapping[str, Any], training: TrainingArguments, ranks: int) -> Iterator[str]:
    """Yield the conflicts between the file and the flags, each with both values."""
    for path, value, flag in (*_batch_values(training, ranks), *_section_values(config, training)):
        written = _look_up(config, path)
        if written not in (_ABSENT, None, "auto", value):
            yield f"{path}: {json.dumps(written)} in the file, {json.dumps(value)} by {flag}."


def _batch_values(training: TrainingArguments, ranks: int) -> Iterator[tuple[str, Any, str]]:
    size, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if not training.auto_find_batch_size:
        yield "train_micro_batch_size_per_gpu", size, "--per_device_train_batch_size"
        yield (
            "train_batch_size",
            size * accumulation * ranks,
            f"--per_device_train_batch_size {size} x --gradient_accumulation_steps {accumulation} x {ranks} ranks",
        )
    yield "gradient_accumulation_steps", accumulation, "--gradient_accumulation_steps"
    yield "gradient_clipping", training.max_grad_norm, "--max_grad_norm"
    yield "bf16.enabled", bool(training.bf16), "--bf16"
    yield "fp16.enabled", bool(training.fp16), "--fp16"


def _section_values(config: Mapping[str, Any], training: TrainingArguments) -> Iterator[tuple[str, Any, str]]:
    """Yield the values that the flags require in the sections of optimizer and scheduler."""
    optim, schedule = (getattr(value, "value", value) for value in (training.optim, training.lr_scheduler_type))
    written = _look_up(config, "optimizer.type")
    same = str(written).lower() in ("adam", "adamw") and str(optim).startswith("adamw")
    yield "optimizer.type", written if same else optim, "--optim"
    yield "optimizer.params.lr", training.learning_rate, "--learning_rate"
    yield "optimizer.params.betas", [training.adam_beta1, training.adam_beta2], "--adam_beta1 and --adam_beta2"
    yield "optimizer.params.eps", training.adam_epsilon, "--adam_epsilon"
    yield "optimizer.params.weight_decay", training.weight_decay, "--weight_decay"
    written = _look_up(config, "scheduler.type")
    same = _SCHEDULES.get(str(written)) == schedule
    yield "scheduler.type", written if same else schedule, "--lr_scheduler_type"
    yield "scheduler.params.warmup_max_lr", training.learning_rate, "--learning_rate"
    yield "scheduler.params.warmup_min_lr", 0, "every schedule here"
    if training.max_steps > 0:
        yield "scheduler.params.total_num_steps", training.max_steps, "--max_steps"
    if (
        training.warmup_steps == 0 or training.warmup_steps >= 1
    ):  # otherwise a share of a number of steps that is not known yet
        yield "scheduler.params.warmup_num_steps", training.warmup_steps, "--warmup_steps"


def _look_up(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def check_fsdp(training: TrainingArguments) -> None:
    """Check the flags of FSDP.

    Args:
        training: Training arguments as the user set them, before transformers completes them.

    Raises:
        UserError: the flags are wrong; the message has all their problems.
    """
    config = read_settings(training.fsdp_config or {}, "fsdp_config")
    if not training.fsdp:
        if config:
            raise UserError("--fsdp_config has no effect without --fsdp True: add it, or leave both out.")
        return
    problems = list(_fsdp_problems({name.removeprefix("fsdp_"): value for name, value in config.items()}, training))
    if problems:
        raise UserError("--fsdp cannot train with these settings:" + "".join(f"\n  {problem}" for problem in problems))


def reads_on_one_rank(training: TrainingArguments) -> bool:
    """Return whether only rank 0 reads the weights, and sends them to the others when they are sharded (FSDP2)."""
    config = read_settings(training.fsdp_config or {}, "fsdp_config") if training.fsdp else {}
    chosen = config.get("cpu_ram_efficient_loading", config.get("fsdp_cpu_ram_efficient_loading", False))
    return str(chosen).lower() == "true"


def offloading_backend(training: TrainingArguments) -> str | None:
    """Return the backend of a process group for FSDP2 with ``cpu_offload``; None for the default one.

    The norm of gradients in host memory is summed over ranks there, which NCCL cannot do. accelerate adds gloo only if
    its own launcher has set its variables before the group starts.
    """
    config = read_settings(training.fsdp_config or {}, "fsdp_config")
    offloads = str(config.get("cpu_offload", config.get("fsdp_cpu_offload", False))).lower() == "true"
    return "cuda:nccl,cpu:gloo" if training.fsdp and offloads and not training.use_cpu else None


def _fsdp_problems(config: Mapping[str, Any], training: TrainingArguments) -> Iterator[str]:
    if training.deepspeed:
        yield "--deepspeed: both shard the model. Keep one of the two."
    if training.use_cpu and torch.accelerator.is_available():
        yield "--use_cpu True: FSDP2 shards on the accelerator that it finds. Leave one of the two out."
    if training.use_cpu and str(config.get("cpu_offload", False)).lower() == "true":
        yield "cpu_offload in --fsdp_config without an accelerator: the model is in host memory anyway. Write false."
    for name in sorted(config.keys() - _FSDP_KEYS):
        yield f"{name} in --fsdp_config is not a setting of FSDP2.{nearest(name, _FSDP_KEYS)}"
    if str(config.get("version", 2)) != "2":
        yield f"version: {config['version']} in --fsdp_config: transformers removes it; only 2 is supported here."
    if training.save_only_model and training.load_best_model_at_end:
        yield "--save_only_model with --load_best_model_at_end: the best checkpoint could not be loaded. Keep one."
    kind = config.get("state_dict_type", _STATE_DICT_TYPES[0])
    if training.save_only_model and kind == "SHARDED_STATE_DICT":
        yield "state_dict_type: SHARDED_STATE_DICT in --fsdp_config with --save_only_model. Keep one."
    if kind not in _STATE_DICT_TYPES:
        yield f"state_dict_type: {kind!r} in --fsdp_config is not one of {', '.join(_STATE_DICT_TYPES)}."
    if config.get("activation_checkpointing") and training.gradient_checkpointing:
        yield "activation_checkpointing in --fsdp_config and --gradient_checkpointing: keep one, or it is done twice."
