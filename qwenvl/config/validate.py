"""Check settings of different argument classes against each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch

from qwenvl.config.data import DataArguments
from qwenvl.config.lora import AdapterArguments, Part, contradiction, target_parts
from qwenvl.config.model import ModelArguments
from qwenvl.config.optimizers import check_optimizer
from qwenvl.config.rules.best_metric import available_metrics, require_metric
from qwenvl.config.rules.engines import read_settings, reads_on_one_rank
from qwenvl.config.rules.hf_arguments import WARNED
from qwenvl.config.schedules import check_schedule
from qwenvl.config.tasks import TaskArguments
from qwenvl.config.training import TrainingArguments
from qwenvl.utils.errors import UserError, nearest

logger = logging.getLogger(__name__)


def check_required(model: ModelArguments, data: DataArguments, output_dir: str | None) -> None:
    """Check that all settings without a default were given.

    Raises:
        UserError: one is missing.
    """
    if not model.model_name_or_path:
        raise UserError("--model_name_or_path is missing: give a checkpoint's folder or Hugging Face id.")
    if not data.dataset_use.strip() and data.packing_plan is None:  # a plan names its datasets
        raise UserError("--dataset_use is missing: name one or more datasets of the registry, separated by commas.")
    if not output_dir:
        raise UserError("--output_dir is missing: name a folder for checkpoints and the trained model.")


def check_together(
    model: ModelArguments,
    adapters: AdapterArguments,
    data: DataArguments,
    training: TrainingArguments,
    tasks: TaskArguments,
) -> None:
    """Check settings of different classes against each other.

    Raises:
        UserError: nothing is trained, evaluation is asked for without data, or a flag is not supported.
    """
    _check_trained_parts(model, adapters, data, has_head=tasks.task is not None or model.train_mtp)
    if model.train_mtp:
        _check_mtp(adapters, tasks)
    if tasks.task is not None:
        _check_task(tasks.task, data, training)
    if tasks.task == "grounding":
        _check_frozen(model, adapters)
        _check_unshared(training)
    _check_quantization(adapters, training)
    if training.max_steps == 0:
        raise UserError(
            "--max_steps 0 trains nothing. Leave it out for --num_train_epochs, or add --dry_run to see what training "
            "would do."
        )
    if training.torch_compile and (training.deepspeed or training.fsdp):
        raise UserError(
            "--torch_compile with --deepspeed or --fsdp is not supported: they gather the weights of a layer while it "
            "runs. Leave one of them out."
        )
    if reads_on_one_rank(training):
        _check_reading(data, adapters, tasks, model)
    if training.log_sample_losses and training.use_liger_kernel:
        raise UserError(
            "--log_sample_losses True with --use_liger_kernel True: Liger Kernel's loss has no losses of "
            "single tokens. Leave --use_liger_kernel out: our own loss in chunks does."
        )
    _check_choice("torch_compile_backend", training.torch_compile_backend, _compile_backends)
    _check_choice("torch_compile_mode", training.torch_compile_mode, _compile_modes)
    if training.neftune_noise_alpha and data.data_flatten:
        raise UserError(
            "--neftune_noise_alpha with --data_flatten or --data_packing: its noise shrinks with the length of the "
            "row, so that packed samples would get less noise than single ones. Leave one of them out."
        )
    check_optimizer(training)
    check_schedule(training)
    training.check_questions()
    _check_evaluation(data, training)
    _check_best_metric(training, tasks.metrics)


def _check_choice(name: str, value: str | None, choices: Callable[[], Sequence[str]]) -> None:
    """Check a value that transformers passes on to libraries, which would refuse it only after loading."""
    if value is not None and value not in (known := choices()):
        raise UserError(f"--{name} {value} is not one of {', '.join(known)}.{nearest(value, known)}")


def _compile_backends() -> Sequence[str]:
    return [str(name) for name in torch.compiler.list_backends(exclude_tags=())]


def _compile_modes() -> Sequence[str]:
    from torch import _inductor  # slow to import, and rarely needed

    return [str(name) for name in _inductor.list_mode_options()]


def _check_evaluation(data: DataArguments, training: TrainingArguments) -> None:
    if training.eval_generate and not _evaluates(training):
        raise UserError("--eval_generate needs evaluations, and there are none: add --eval_strategy steps.")
    if training.do_eval and not _evaluates(training):
        raise UserError("--do_eval True evaluates nothing without --eval_strategy: add --eval_strategy steps.")
    if _evaluates(training) and not _has_evaluation_data(data):
        raise UserError(
            "there is nothing to evaluate on, and --eval_strategy or --eval_on_start asks for it. Add "
            "--eval_dataset_use NAMES or --eval_ratio 0.01, or leave these out."
        )


def _check_best_metric(training: TrainingArguments, of_task: Sequence[str]) -> None:
    """Check the flags that choose a checkpoint, as far as they can be checked without data."""
    metric: Any = training.metric_for_best_model
    if metric is None:
        return
    if training.eval_strategy == "no":
        raise UserError(
            "--metric_for_best_model, --save_strategy best and --load_best_model_at_end choose by evaluations, and "
            "there are none: add --eval_strategy steps or epoch."
        )
    if not training.eval_generate:  # otherwise the metrics of answers are known once the data are open
        advice = "" if of_task else " Metrics of answers need --eval_generate 100, say."
        require_metric(metric, available_metrics(of_task, (), blind=training.eval_blind), advice)


_SWITCHES: dict[Part, str] = {"vision": "tune_mm_vision", "merger": "tune_mm_mlp", "language": "tune_mm_llm"}


def _check_task(task: str, data: DataArguments, training: TrainingArguments) -> None:
    if training.eval_generate:
        raise UserError(f"--eval_generate asks for answers, and --task {task} learns none. Leave it out.")
    if data.overlength == "truncate_turns":
        raise UserError(
            f"--overlength truncate_turns leaves out turns from the end, where the question of --task {task} is. Use "
            "drop or error."
        )
    if data.loss_on != "all" or data.history == "last":
        flag = f"--loss_on {data.loss_on}" if data.loss_on != "all" else "--history last"
        raise UserError(
            f"{flag} is about the answers of a language model, and --task {task} learns none. Leave it out."
        )


def _check_mtp(adapters: AdapterArguments, tasks: TaskArguments) -> None:
    if tasks.task is not None:
        raise UserError(
            f"--train_mtp True with --task {tasks.task}: the layer drafts answers, and the task learns none. Leave one "
            "of them out."
        )
    if adapters.lora_enable:
        raise UserError(
            "--train_mtp True with --lora_enable True: a folder of adapters has no place for a whole layer. Train and "
            "merge the adapters first (tools/merge_lora.py), then train the layer alone, on the merged folder: "
            "--train_mtp True, with --tune_mm_llm, --tune_mm_mlp and --tune_mm_vision False."
        )


def _check_frozen(model: ModelArguments, adapters: AdapterArguments) -> None:
    switches = [switch for switch in _SWITCHES.values() if getattr(model, switch)]
    switches += ["lora_enable"] if adapters.lora_enable else []
    if switches:
        raise UserError(
            f"--task grounding reads the attention of a frozen model, and --{' and --'.join(switches)} "
            "would train it. Leave these flags out."
        )
    if model.attn_implementation not in ("auto", "sdpa"):
        raise UserError(
            f"--attn_implementation {model.attn_implementation} does not show what --task grounding reads. Leave it "
            "out, for SDPA."
        )


def _check_unshared(training: TrainingArguments) -> None:
    zero3 = training.deepspeed and read_settings(training.deepspeed, "deepspeed")["zero_optimization"]["stage"] == 3
    if zero3 or training.fsdp:
        raise UserError(
            f"--task grounding with {'ZeRO-3' if zero3 else '--fsdp'}: ranks would have to gather the head's weights "
            "together, but the number of their forward passes depends on their images. Use configs/zero2.json, or no "
            "sharding."
        )


def _check_trained_parts(
    model: ModelArguments, adapters: AdapterArguments, data: DataArguments, *, has_head: bool
) -> None:
    whole = [part for part, switch in _SWITCHES.items() if getattr(model, switch)]
    if not whole and not adapters.lora_enable and not has_head:
        raise UserError(
            "nothing would be trained: set one or more of --tune_mm_llm, --tune_mm_mlp and --tune_mm_vision to True, "
            "or --lora_enable True."
        )
    if adapters.lora_enable:
        named = target_parts(adapters.lora_target) or ()
        for part in whole:
            if part in named:
                raise UserError(contradiction(_SWITCHES[part], adapters.lora_target))
        if model.tune_mm_llm:
            raise UserError(
                "--tune_mm_llm True with --lora_enable True: the folder of adapters would hold the whole language "
                "model, and PEFT would not tie its embeddings again. Leave one of them out."
            )
    if data.additional_tokens and not (model.tune_mm_llm or adapters.lora_enable):
        raise UserError(
            "--additional_tokens: nothing would train their embeddings. Add --tune_mm_llm True, or --lora_enable True, "
            "which trains only their rows."
        )


def _check_reading(
    data: DataArguments, adapters: AdapterArguments, tasks: TaskArguments, model: ModelArguments
) -> None:
    """Refuse what adds tensors to those of the checkpoint, which the ranks that read nothing would not have."""
    given = {
        "--lora_enable True": adapters.lora_enable,
        f"--task {tasks.task}": tasks.task,
        "--train_mtp True": model.train_mtp,
        "--additional_tokens": data.additional_tokens,
    }
    for flag in (name for name, value in given.items() if value):
        raise UserError(
            f"{flag} with cpu_ram_efficient_loading in --fsdp_config: only the weights of a checkpoint are sent to the "
            "other ranks. Write false, or use --deepspeed configs/zero3.json, which shards weights as they are read."
        )


def _check_quantization(adapters: AdapterArguments, training: TrainingArguments) -> None:
    if not adapters.quantization_bit:
        return
    flag = f"--quantization_bit {adapters.quantization_bit}"
    if training.deepspeed or training.fsdp:
        raise UserError(f"{flag} with --deepspeed or --fsdp is not supported: quantized weights cannot be sharded.")
    if training.dry_run and not torch.cuda.is_available():
        return  # which computes memory and hours without loading the weights
    if training.use_cpu or not torch.cuda.is_available():
        raise UserError(f"{flag} needs a CUDA device: bitsandbytes trains on no other. Leave it out for plain LoRA.")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{flag} needs a package that is missing: pip install bitsandbytes.")


def log_without_effect(
    model: ModelArguments,
    adapters: AdapterArguments,
    data: DataArguments,
    training: TrainingArguments,
    tasks: TaskArguments,
    given: frozenset[str],
) -> None:
    """Log each setting that was given but has no effect.

    Args:
        model: Model arguments.
        adapters: Arguments of the adapters.
        data: Data arguments.
        training: Training arguments.
        tasks: Arguments of tasks.
        given: Names of the settings that the user gave.
    """
    if "base_interval" in given:
        logger.info("base_interval has no effect, here as in the official recipe.")
    rates: dict[Part, str] = {"merger": "mm_projector_lr", "vision": "vision_tower_lr"}
    for part, rate in rates.items():
        trains = getattr(model, _SWITCHES[part]) or part in adapters.adapted_parts
        if getattr(training, rate) is not None and not trains:
            logger.warning("--%s has no effect: --%s is False.", rate, _SWITCHES[part])
    for name in sorted(given & WARNED.keys()):
        logger.warning(
            "--%s has no effect: every epoch holds each sample once, in a new order. --group_by_cost True makes steps "
            "of rows of similar cost and length.",
            name,
        )
    of_adapters = {field.name for field in fields(AdapterArguments)} - {"lora_enable"}
    if not adapters.lora_enable and (unused := sorted(given & of_adapters)):
        logger.info("%s: no effect without --lora_enable True.", ", ".join(unused))
    of_tasks = {field.name for field in fields(TaskArguments)}
    if tasks.task is None and (unused := sorted(given & of_tasks)):
        logger.warning("%s: no effect without --task.", ", ".join(f"--{name}" for name in unused))
    if "mtp_loss_weight" in given and not model.train_mtp:
        logger.warning("--mtp_loss_weight has no effect without --train_mtp True.")
    if "group_by_cost" in given and data.data_packing:
        logger.info("group_by_cost has no effect with packs: their steps are balanced without it.")
    if _has_evaluation_data(data) and not _evaluates(training) and tasks.task is None:  # which is at its end
        logger.warning("Evaluation data are set, but --eval_strategy is no: nothing is evaluated.")


def _evaluates(training: TrainingArguments) -> bool:
    return training.eval_strategy != "no" or training.eval_on_start


def _has_evaluation_data(data: DataArguments) -> bool:
    return bool(data.eval_dataset_use or data.eval_ratio)
