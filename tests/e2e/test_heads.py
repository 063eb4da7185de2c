"""Heads on hidden states in whole runs: however samples are laid out, split and trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.e2e.labelled import CLASSES, EVALUATION, FROZEN, SETTINGS, TASKS
from tests.e2e.runs import (
    LORA,
    REPOSITORY,
    equal_bits,
    flags,
    history,
    largest_difference,
    run_on_two_ranks,
    train,
    weights,
)


@pytest.mark.parametrize("task", TASKS)
def test_packed_padded_and_accumulated_samples_train_alike(
    task: str, tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    """Everything trains, by plain gradient descent, so that a difference of weights is one of gradients."""
    model, registry = tiny_checkpoint("qwen3_vl"), labelled(task)
    layouts = {
        "padded": {"data_flatten": False},
        "flattened": {"data_flatten": True, "gradient_checkpointing": True},
        "packed": {"data_packing": True, "model_max_length": 1024, "per_device_train_batch_size": 1, "max_steps": 2},
        "accumulated": {"gradient_accumulation_steps": 11, "per_device_train_batch_size": 1},
    }
    if task in ("regression", "multilabel"):
        del layouts["accumulated"]
    whole = {"per_device_train_batch_size": 11, "max_steps": 2, "task": task, **TASKS[task], **SETTINGS, **EVALUATION}
    whole["eval_steps"] = 2
    runs = {name: train(model, tmp_path / name, registry, **{**whole, **layout}) for name, layout in layouts.items()}
    for name in runs:
        assert history(runs[name]) == pytest.approx(history(runs["padded"]), rel=1e-5), name
        assert history(runs[name], "eval_loss") == pytest.approx(history(runs["padded"], "eval_loss"), rel=1e-5)
        assert largest_difference(runs[name], runs["padded"]) < 1e-6, name
    moved = {
        name for name, value in weights(runs["padded"]).items() if not value.equal(weights(model).get(name, value))
    }
    assert any("visual" in name for name in moved) and any("layers.0" in name for name in moved)


def test_a_frozen_model_stays_as_it_is_and_its_head_learns(
    tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_checkpoint("qwen3_vl")
    settings = {**SETTINGS, **FROZEN, **EVALUATION, "optim": "adamw_torch", "learning_rate": 1e-6, "head_lr": 0.05}
    settings |= {"task": "classification", "max_steps": 10, "bf16": True, "pooling": "mean", "logging_steps": 5}
    folder = train(model, tmp_path / "run", labelled("classification"), **settings)
    losses, accuracy = history(folder), history(folder, "eval_accuracy")
    assert losses[-1] < losses[0] and len(accuracy) == 4
    assert set(load_file(folder / "task_head.safetensors")) == {"score.weight", "score.bias"}
    assert load_file(folder / "task_head.safetensors")["score.weight"].dtype.itemsize == 4
    record = json.loads((folder / "task.json").read_text())
    assert record["classes"] == list(CLASSES) and record["pooling"] == "mean"
    assert (folder / "confusion_matrix.svg").read_text().startswith("<svg")
    opened, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    original = weights(model)
    assert all(
        original[name].bfloat16().equal(value.bfloat16())
        for name, value in opened.state_dict().items()
        if name in original
    )


@pytest.mark.parametrize("kind", ["frozen", "adapters", "whole"])
def test_a_resumed_run_ends_with_the_same_bits(
    kind: str, tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = {"frozen": FROZEN, "adapters": LORA, "whole": {}}[kind]
    settings = {**SETTINGS, **chosen, "optim": "adamw_torch", "task": "regression", "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    model, registry = tiny_checkpoint("qwen3_vl"), labelled("regression")
    whole = train(model, tmp_path / "whole", registry, **settings)
    resume = {"resume_from_checkpoint": whole / "checkpoint-2"}
    resumed = train(model, tmp_path / "resumed", registry, **settings, **resume)
    assert equal_bits(whole, resumed) and not equal_bits(whole, whole / "checkpoint-2")
    assert history(whole) == history(resumed)
    files = {path.name for path in (whole / "checkpoint-2").iterdir()}
    assert {"task.json", "task_head.safetensors"} <= files and ("adapter_config.json" in files) == (kind == "adapters")


METRICS = {
    "classification": ["eval_accuracy"],
    "ranking": ["eval_ndcg", "eval_kendall_tau"],
    "multilabel": ["eval_map"],
}


@pytest.mark.slow
def test_two_ranks_train_heads_like_one_process(
    tiny_checkpoint: Callable[[str], Path], labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    """DDP, ZeRO-3 and FSDP2 over gloo; seven samples are evaluated, so that one rank has one less."""
    pytest.importorskip("deepspeed")
    model = tiny_checkpoint("qwen3_vl")
    zero = json.loads((REPOSITORY / "configs" / "zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    common = {**SETTINGS, **EVALUATION, "max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    common |= {"save_steps": 2, "optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-2, "ddp_timeout": 600}
    cases: dict[str, dict[str, Any]] = {
        "classification": {**TASKS["classification"], **FROZEN, "data_flatten": True},
        "ranking": {**TASKS["ranking"], "gradient_checkpointing": True},
        "multilabel": {**TASKS["multilabel"], **LORA, "lora_target": r"model\.language_model\.layers\.0\..*proj"},
    }
    single = {}
    commands = {}
    for task, chosen in cases.items():
        settings = {**common, **chosen, "task": task}
        alone = {**settings, "gradient_accumulation_steps": 2}
        single[task] = train(model, tmp_path / "single" / task, labelled(task), **alone)
        if task == "ranking":
            sharded = {**settings, "fsdp": True, "fsdp_config": REPOSITORY / "configs" / "fsdp2.json"}
            commands["ranking fsdp"] = flags(model, tmp_path / "ranking fsdp", labelled(task), **sharded)
        if task == "classification":
            commands[task] = flags(model, tmp_path / task, labelled(task), **settings)
        if task != "classification":
            sharded = {**settings, "deepspeed": tmp_path / "zero3.json"}
            commands[f"{task} sharded"] = flags(model, tmp_path / f"{task} sharded", labelled(task), **sharded)
    again = ["--output_dir", str(tmp_path / "resumed")]
    again += ["--resume_from_checkpoint", str(tmp_path / "ranking sharded" / "checkpoint-2")]
    whole = commands["ranking sharded"]
    place = whole.index("--output_dir")
    commands["resumed"] = [*whole[:place], *whole[place + 2 :], *again]
    engines = {name: "DDP" if name in cases else "ZeRO-3" for name in commands} | {"ranking fsdp": "FSDP2"}
    split = run_on_two_ranks(tmp_path, commands, engines)
    for name in commands:
        task = name.partition(" ")[0] if name != "resumed" else "ranking"
        assert largest_difference(split[name], single[task]) < 1e-5, name
        for key in ("loss", "eval_loss", *METRICS[task]):
            assert history(split[name], key) == pytest.approx(history(single[task], key), rel=1e-4), (name, key)
    assert equal_bits(split["resumed"], split["ranking sharded"])
