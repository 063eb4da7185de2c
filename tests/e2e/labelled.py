"""Labelled samples for whole runs with heads, and the settings of a run of each task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DESCENT = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0}
FROZEN = {"tune_mm_vision": False, "tune_mm_mlp": False, "tune_mm_llm": False}
EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "eval_dataset_use": "held_out",
    "per_device_eval_batch_size": 3,
}
CLASSES = ("dark", "grey", "light")


SETTINGS = {"dataset_use": "samples", **DESCENT}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"class_weights": "balanced", "task_loss": "focal"},
    "regression": {"pooling": "mean", "task_loss": "huber", "head": "mlp"},
    "multilabel": {"pooling": "vision_mean", "hidden_layer": -2},
    "ranking": {},
}


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


def write_labelled(folder: Path) -> Callable[[str], Path]:
    """Return a function of the task that returns a registry of labelled samples, ``samples`` and ``held_out``."""
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
