"""Tables that summarise a run before its first step: model, trainable parts, data and budget."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedModel

from qwenvl.config import ParsedArguments, TrainingArguments
from qwenvl.config.lora import Part
from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding.encoded import Event
from qwenvl.data.encoding.processor import describe_limits
from qwenvl.data.sample_stats import count_remarks
from qwenvl.models.attention.varlen import varlen_obstacle
from qwenvl.models.loading import choose_attention, flash_obstacles
from qwenvl.models.lora.adapters import adapter_sizes, count_adapted_experts, count_adapted_layers
from qwenvl.models.lora.experts import count_experts, default_expert_rank, expert_modules
from qwenvl.models.rope_scaling import describe_context
from qwenvl.models.trainable.freezing import ModuleSummary, checkpointed_parts, summarize
from qwenvl.models.trainable.param_groups import learning_rates_of, parameter_groups
from qwenvl.profiling.device_specs import name_device
from qwenvl.profiling.state_memory import read_sharding
from qwenvl.train.build.data import RunData
from qwenvl.train.build.model import compute_type, weight_types
from qwenvl.train.schedule import Schedule, plan_schedule, slowest_over_mean
from qwenvl.utils.distributed import world_size
from qwenvl.utils.tables import as_text, pairs, table

logger = logging.getLogger(__name__)


def log_start(parsed: ParsedArguments, model: PreTrainedModel, data: RunData, checkpoint: str | None) -> None:
    """Log the tables at the start of a run; compute nothing if they are not logged."""
    if not logger.isEnabledFor(logging.INFO):
        return
    schedule = plan_schedule(len(data.train), parsed.training, world_size())
    parts = [
        *describe_model(parsed, model),
        *describe_data(data, schedule, parsed.training),
        describe_budget(parsed.training, data, schedule, checkpoint),
    ]
    logger.info("Training starts.\n\n%s\n", as_text(*parts))


def describe_model(parsed: ParsedArguments, model: PreTrainedModel) -> Iterator[Table]:
    """Yield tables of the model and its trainable parts.

    Args:
        parsed: Arguments of the run.
        model: Model that is ready for training, on any device.
    """
    parts = summarize_parts(model, parsed.training)
    yield pairs(
        "Model",
        {
            "name": parsed.model.model_name_or_path,
            "family": model.config.model_type,
            "parameters": f"{sum(part.total for part in parts):,}",
            "precision": _describe_precision(parsed),
            "attention": _describe_attention(parsed),
            "checkpointing": " and ".join(checkpointed_parts(model)) or "none",
            "context": describe_context(model.config),
            "adapters": _describe_adapters(parsed, model),
            "experts": _describe_experts(parsed, model),
        },
    )
    yield _part_table(parts, adapter_sizes(model))


def summarize_parts(model: PreTrainedModel, args: TrainingArguments) -> list[ModuleSummary]:
    """Return the trainable parameters and the peak learning rate of each part of a model that is ready for training."""
    groups = parameter_groups(
        model,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        mm_projector_lr=args.mm_projector_lr,
        vision_tower_lr=args.vision_tower_lr,
    )
    return summarize(model, learning_rates_of(groups))


def _part_table(parts: Sequence[ModuleSummary], adapters: dict[Part, int]) -> Table:
    """Return a table of the parts of a model and their sum, with the sizes of adapters if there are any."""
    total = ModuleSummary("language", sum(part.trainable for part in parts), sum(part.total for part in parts))
    sizes = {"all": sum(adapters.values())} | {str(name): size for name, size in adapters.items()}
    rows = []
    for name, part in [*((part.module, part) for part in parts), ("all", total)]:
        rate = f"{part.learning_rate:g}" if part.trainable and part.learning_rate is not None else "-"
        share = f"{part.trainable / part.total:.2%}" if part.total else "-"
        cells = [name, f"{part.trainable:,}", f"{part.total:,}", share, rate]
        rows.append([*cells, f"{sizes.get(name, 0):,}"] if adapters else cells)
    headings = ["part", "trained", "of", "share", "learning rate", *(["of adapters"] if adapters else [])]
    return table("Trained parts", headings, rows)


def _describe_precision(parsed: ParsedArguments) -> str:
    frozen, trained = (_name(kind) for kind in weight_types(parsed))
    weights = f"weights {trained}" if frozen == trained else f"trained weights {trained}, frozen ones {frozen}"
    quantized = f", the language model in {parsed.adapters.quantization_bit} bits"
    return f"{weights}{quantized * bool(parsed.adapters.quantization_bit)}; computed in {_name(compute_type(parsed))}"


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _describe_attention(parsed: ParsedArguments) -> str:
    """Return the attention implementation and, with ``auto``, why it is not a better one."""
    half_precision = compute_type(parsed) != torch.float32
    chosen = choose_attention(parsed.model.attn_implementation, half_precision=half_precision)
    shown = {"sdpa": "sdpa, one sample at a time", "varlen": "varlen, all samples in one call"}
    text = shown.get(chosen, chosen)
    if parsed.model.attn_implementation != "auto":
        return text
    obstacles = flash_obstacles(half_precision=half_precision)
    if chosen == "sdpa":
        obstacles["varlen"] = varlen_obstacle(half_precision=half_precision)
    reasons: dict[str, list[str]] = {}
    for kind, obstacle in obstacles.items():
        if obstacle:
            reasons.setdefault(obstacle, []).append(kind)
    given = "; ".join(f"no {' or '.join(kinds)}: {obstacle}" for obstacle, kinds in reasons.items())
    return f"{text} ({given})" if given else text


def _describe_adapters(parsed: ParsedArguments, model: PreTrainedModel) -> str:
    chosen = parsed.adapters
    if not chosen.lora_enable:
        return ""
    kind = "rank-stabilised " * chosen.use_rslora + ("DoRA" if chosen.use_dora else "LoRA")
    size = f"rank {chosen.lora_r}, alpha {chosen.lora_alpha:g}, dropout {chosen.lora_dropout:g}"
    return f"{kind} of {size}, in {count_adapted_layers(model)} linear layers (--lora_target {chosen.lora_target})"


def _describe_experts(parsed: ParsedArguments, model: PreTrainedModel) -> str:
    """Return which adapters the stacked experts have; empty without adapters or experts."""
    chosen, modules = parsed.adapters, expert_modules(model)
    if not chosen.lora_enable or not modules:
        return ""
    adapted = count_adapted_experts(model)
    if not adapted:
        return f"{count_experts(model):,} weights have no adapters (--lora_target language,experts gives them some)"
    number, rank = model.config.get_text_config().num_experts, chosen.lora_expert_r
    reason = "--lora_expert_r" if rank else "--lora_r / experts per token"
    rank = rank or default_expert_rank(model, chosen.lora_r)
    return f"adapters of rank {rank} ({reason}) in each of {number} experts, in {adapted} of {len(modules)} layers"


def describe_data(data: RunData, schedule: Schedule, args: TrainingArguments) -> Iterator[Table]:
    """Yield tables of the datasets, their samples if counted, and their use."""
    yield _dataset_table(data)
    if data.arranged.measures is not None:
        thinking = data.encoder.template.has_switch
        yield _measured_table(data.train.tables, data.arranged.measures, data.arranged.events, thinking)
    packs = data.arranged.packs
    text = "" if packs is None else f"{packs.count:,} of up to {packs.limit:,} tokens, {packs.fill:.2%} full"
    values = {
        "packs": f"{text}; no fewer than {packs.fewest:,}" if packs else "",
        "plan": str(packs.source) if packs and packs.source else "",
        "balance": _describe_balance(data, schedule, args),
        **describe_limits(data.encoder.settings),
    }
    yield pairs("", values)


def _dataset_table(data: RunData) -> Table:
    """Return a table of the datasets: rows, share taken, and numbers of rows for training and evaluation."""
    uses = ([*data.train.tables], [*data.evaluation.tables] if data.evaluation else [])
    rows: dict[str, list[str]] = {}
    for column, tables in enumerate(uses):
        for one in tables:
            spec = one.table.spec
            taken = f"{spec.sampling_percent:g}%"
            row = rows.setdefault(spec.name, [spec.name, f"{len(one.table):,}", taken, "-", "-"])
            row[3 + column] = f"{len(one.rows):,}"
    if len(rows) > 1:
        sums = [sum(len(one.rows) for one in tables) for tables in uses]
        rows[""] = ["all", "", "", *(f"{count:,}" if count else "-" for count in sums)]
    return table("Data", ["dataset", "rows", "taken", "to train on", "to evaluate"], list(rows.values()))


def _measured_table(
    tables: Sequence[SampledTable], measures: np.ndarray, events: Sequence[Event], thinking: bool
) -> Table:
    """Return a table of exact counts of training samples, and of skipped samples by reason.

    Args:
        tables: Datasets.
        measures: Measures of every row, in the order of the datasets.
        events: Events of the rows.
        thinking: Whether the chat template can turn thinking on and off.
    """
    borders = np.cumsum([0, *(len(one.rows) for one in tables)])
    parts = {one.table.spec.name: measures[borders[number] : borders[number + 1]] for number, one in enumerate(tables)}
    left_out = Counter((event.dataset, event.record["category"]) for event in events if event.record)
    rows = []
    for name, part in [*parts.items(), *([("all", measures)] if len(parts) > 1 else [])]:
        reasons = [f"{count:,} {why.replace('_', ' ')}" for (of, why), count in sorted(left_out.items()) if of == name]
        missing = f"{left_out.total():,}" if name == "all" else ", ".join(reasons) or "0"
        rows.append([name, *(f"{count:,}" for count in _sums(part)), *_contexts(part), missing])
    headings = [
        "dataset",
        "samples",
        "tokens",
        "trained",
        "patches",
        "longest",
        "rows",
        "thoughts",
        "weighted",
        "left out",
    ]
    several, thoughts = (measures["rows"] > measures["samples"]).any(), thinking or measures["thoughts"].any()
    weighted = measures["weighted"].any()
    chosen = [number for number, one in enumerate([*(True,) * 6, several, thoughts, weighted, True]) if one]
    cells = [[row[number] for number in chosen] for row in rows]
    return table("Samples to train on", [headings[number] for number in chosen], cells, words=(0, len(chosen) - 1))


def _contexts(part: np.ndarray) -> list[str]:
    """Return training rows, and numbers of answers with a thought and of answers with a weight other than 1."""
    rows, answers, *some = (int(part[field].sum()) for field in ("rows", "answers", "thoughts", "weighted"))
    return [f"{rows:,}", *(f"{count:,} of {answers:,} answers" for count in some)]


def describe_remarks(tables: Sequence[SampledTable], measures: np.ndarray) -> Iterator[str]:
    """Yield remarks about unusual samples that are trained without changes, each counted once.

    Args:
        tables: Datasets.
        measures: Measures of every row, in the order of the datasets.
    """
    borders = np.cumsum([0, *(len(one.rows) for one in tables)])
    for number, one in enumerate(tables):
        _, once = np.unique(one.rows, return_index=True)
        yield from count_remarks(one.table.spec.name, measures[borders[number] + once])


def _sums(part: np.ndarray) -> list[int]:
    """Return the numbers of samples, tokens, trained tokens and patches, and the tokens of the longest row."""
    fields = ("samples", "tokens", "trained_tokens", "patches")
    return [*(int(part[field].sum()) for field in fields), int(part["tokens"].max(initial=0))]


def _describe_balance(data: RunData, schedule: Schedule, args: TrainingArguments) -> str:
    order = data.order
    if schedule.ranks == 1 or order.costs is None:
        return ""
    random = replace(order, costs=None, lengths=None)
    ours, other = (slowest_over_mean(one, order.costs, args, schedule.ranks) for one in (order, random))
    return f"the slowest rank has {ours:.3f} times the mean work; {other:.3f} in random order"


def describe_budget(args: TrainingArguments, data: RunData, schedule: Schedule, checkpoint: str | None) -> Table:
    """Return a table of steps, devices, evaluations, checkpoints and outputs.

    Args:
        args: Arguments of the run.
        data: Data of the run.
        schedule: Schedule of the run.
        checkpoint: Checkpoint to resume from, or None.
    """
    unit = "packs" if data.arranged.packs else "rows"
    share = f"batches of {args.train_batch_size} x {args.gradient_accumulation_steps}"
    warmup, optimizer = args.get_warmup_steps(schedule.steps), getattr(args.optim, "value", args.optim)
    return pairs(
        "Budget",
        {
            "steps": f"{schedule.steps:,} in all, {schedule.steps_of_epoch:,} per epoch: {schedule.epochs:.2f} epochs",
            "per step": f"{schedule.step_size:,} {unit}: {_devices(args, schedule.ranks)} x {share} accumulated",
            "tokens": _tokens_of_step(data, schedule),
            "optimizer": f"{optimizer}, warmup of {warmup:,}, then {args.lr_scheduler_type.value}",
            "evaluation": _describe_evaluation(args, data, schedule),
            "checkpoints": _describe_saving(args, schedule),
            "engine": read_sharding(args, schedule.ranks).name,
            "output": str(args.output_dir),
            "resumes from": checkpoint or "",
        },
    )


def _devices(args: TrainingArguments, ranks: int) -> str:
    return f"{ranks:,} {'device' if ranks == 1 else 'devices'} ({name_device(args.device)})"


def _tokens_of_step(data: RunData, schedule: Schedule) -> str:
    measures = data.arranged.measures
    if measures is None:
        return ""
    each = [int(measures[field].sum()) / schedule.steps_of_epoch for field in ("tokens", "trained_tokens")]
    return f"{each[0]:,.0f} per step on average, {each[1]:,.0f} of them trained"


def _describe_evaluation(args: TrainingArguments, data: RunData, schedule: Schedule) -> str:
    if data.evaluation is None or args.eval_strategy == "no":
        return "none"
    return f"{len(data.evaluation):,} rows, every {_interval(args.eval_strategy, args.eval_steps, schedule)}"


def _describe_saving(args: TrainingArguments, schedule: Schedule) -> str:
    if args.save_strategy == "no":
        return "none"
    if args.save_strategy == "best":
        return "whenever an evaluation is the best so far"
    kept = f", the last {args.save_total_limit} kept" if args.save_total_limit else ""
    return f"every {_interval(args.save_strategy, args.save_steps, schedule)}{kept}"


def _interval(strategy: str, steps: float | None, schedule: Schedule) -> str:
    if strategy == "epoch":
        return "epoch"
    number = schedule.steps_between(steps or 1)
    return f"{number:,} steps" if number > 1 else "step"
