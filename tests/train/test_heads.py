"""Heads on hidden states in whole runs: however samples are laid out, split and trained, and what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.train.runs import LORA, equal_bits, history, largest_difference, train, weights

DESCENT = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0}
FROZEN = {"tune_mm_vision": False, "tune_mm_mlp": False, "tune_mm_llm": False}
EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_dataset_use": "held_out",
    "per_device_eval_batch_size": 3,
}
CLASSES = ("dark", "grey", "light")


def _picture(path: Path, level: int, generator: np.random.Generator) -> str:
    height, width = (int(side) for side in generator.integers(40, 90, 2))
    noise = generator.integers(0, 20, (height, width, 3), dtype=np.uint8)
    Image.fromarray(np.full((height, width, 3), 30 + 90 * level, np.uint8) + noise).save(path)
    return path.name


def _record(folder: Path, number: int) -> dict[str, Any]:
    """A sample with one to three pictures and a label for every task; every third has an answer, which says it."""
    generator = np.random.default_rng(number)
    levels = [int(level) for level in generator.permutation(3)[: 2 + number % 2]]
    names = [_picture(folder / f"{number}-{place}.png", level, generator) for place, level in enumerate(levels)]
    turns = [{"from": "human", "value": f"Sample {'and so on ' * (number % 4)}: how bright?" + "<image>" * len(names)}]
    if number % 3 == 0:
        turns.append({"from": "gpt", "value": CLASSES[levels[0]]})
    labels = {
        "classification": CLASSES[levels[0]],
        "regression": [10.0 * levels[0] + 5, -levels[1]],
        "multilabel": sorted({CLASSES[level] for level in levels}),
        "ranking": levels,
    }
    return {"id": str(number), "image": names, "conversations": turns, "labels": labels}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function of the task that returns a registry of labelled samples, ``samples`` and ``held_out``."""
    folder = tmp_path_factory.mktemp("labelled")
    sets = {"samples": [_record(folder, n) for n in range(11)], "held_out": [_record(folder, n) for n in range(20, 27)]}

    def registry(task: str) -> Path:
        entries = {}
        for name, records in sets.items():
            rows = [{**record, "label": record["labels"][task]} for record in records]
            (folder / f"{task}-{name}.json").write_text(json.dumps(rows))
            entries[name] = {"annotation_path": str(folder / f"{task}-{name}.json"), "data_path": str(folder)}
        (folder / f"{task}.py").write_text(f"data_dict = {entries!r}\n")
        return folder / f"{task}.py"

    return registry


SETTINGS = {"dataset_use": "samples", **DESCENT}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"class_weights": "balanced", "task_loss": "focal"},
    "regression": {"pooling": "mean", "task_loss": "huber", "head": "mlp"},
    "multilabel": {"pooling": "vision_mean", "hidden_layer": -2},
    "ranking": {},
}


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
    whole = {"per_device_train_batch_size": 11, "max_steps": 2, "task": task, **TASKS[task], **SETTINGS, **EVALUATION}
    whole["eval_steps"] = 2
    runs = {name: train(model, tmp_path / name, registry, **{**whole, **layout}) for name, layout in layouts.items()}
    for name in ("flattened", "packed", "accumulated"):
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
    settings |= {"task": "classification", "max_steps": 30, "bf16": True, "pooling": "mean", "logging_steps": 10}
    folder = train(model, tmp_path / "run", labelled("classification"), **settings)
    losses, accuracy = history(folder), history(folder, "eval_accuracy")
    assert losses[-1] < losses[0] and len(accuracy) == 10
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
