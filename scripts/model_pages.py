#!/usr/bin/env python
"""Write the tables of ``docs/models/``: recipes from ``scripts/recipes.py``, memory from published configs.

    python scripts/model_pages.py [CONFIGS]

CONFIGS is a folder of files ``NAME.json``; without it the memory tables stay as they are. Models are built on torch's
meta device (``benchmarks/family_memory.py``), so that no weights are needed. A test compares the pages with the tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.family_memory import build, states
from qwenvl.profiling.device_specs import usable_bytes
from scripts.recipes import MODELS, REPOSITORY, Model

PAGES = {
    "qwen2_5vl": ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B"),
    "qwen3vl": (
        *("Qwen3-VL-2B-Instruct", "Qwen3-VL-4B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-32B-Instruct"),
        *("Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-235B-A22B-Instruct"),
    ),
    "qwen3_5": (
        *("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B"),
        *("Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B"),
    ),
}
"""Models of the memory table of each page of ``docs/models/``."""

SAME = {"Qwen3.5-27B": "Qwen3.6-27B, Qwen3.8-27B", "Qwen3.5-35B-A3B": "Qwen3.6-35B-A3B"}
"""Models of the same shapes as another."""

_VISION = {
    "intermediate_size": 3420,
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_TEXT = {
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "max_position_embeddings": 128_000,
    "use_sliding_window": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "text_config": _TEXT
        | {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
        "vision_config": _VISION | {"out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "Qwen2.5-VL-7B": {
        "text_config": _TEXT
        | {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28},
        "vision_config": _VISION | {"out_hidden_size": 3584},
    },
}
"""Shapes of the models of which CONFIGS has no file."""

COUNTS = {"full": (1, 8, 32), "LoRA": (1, 8)}
"""Numbers of GPUs whose memory is shown."""
GPUS = (24, 48, 80, 141)
"""Memory of the GPUs of the table, in GB of the data sheet."""
ROOM = 0.8
"""Largest share of a GPU's usable memory for weights, gradients and optimizer; the rest is for activations."""


def main() -> None:
    """Write the tables."""
    configs = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for page, names in PAGES.items():
        path = REPOSITORY / "docs" / "models" / f"{page}.md"
        tables = {"recipes": recipe_table(page)}
        if configs is not None:
            tables["memory"] = memory_table([config_of(name, configs) for name in names], names)
        text = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = replace(text, name, table)
        path.write_text(text, encoding="utf-8")


def replace(text: str, name: str, table: str) -> str:
    """Return the text of a page with another table between its two markers."""
    pattern = re.compile(rf"(<!-- {name}[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def recipe_table(page: str) -> str:
    """Return the table of a page's recipes."""
    lines = [
        "| model | recipes | learning rate, full | samples x accumulation, full | engine, full | hardware, full |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_recipe(model) for model in MODELS if _page_of(model) == page]
    return "\n".join(lines)


def _page_of(model: Model) -> str:
    return next(page for page in (*PAGES, "qwen3_5") if model.name.startswith(page) or page == "qwen3_5")


def _recipe(model: Model) -> str:
    engine = "ZeRO-3" if model.engine == "zero3" else "ZeRO-2"
    needs = model.needs.removeprefix("Needs ").rstrip(".") or "at most 8 GPUs of 80 GB"
    name = f"`sft_{model.name}`, `lora_{model.name}`"
    return f"| {model.title} | {name} | {model.rate} | {model.batch} x {model.accumulation} | {engine} | {needs} |"


def config_of(name: str, configs: Path) -> PretrainedConfig:
    """Return the config of a model: its published file, or its shapes."""
    if name in SHAPES:
        return AutoConfig.for_model("qwen2_5_vl", **SHAPES[name])
    return AutoConfig.from_pretrained(configs / f"{name}.json")


def memory_table(configs: list[PretrainedConfig], names: tuple[str, ...]) -> str:
    """Return the table of memory by number and by kind of GPU."""
    columns = [f"{kind}, {count} GPU{'s' * (count > 1)}" for kind in COUNTS for count in COUNTS[kind]]
    columns += [f"GPUs of {memory} GB" for memory in GPUS]
    lines = [f"| model | parameters | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_memory(config, name))} |" for config, name in zip(configs, names, strict=True)]
    return "\n".join(lines)


def _memory(config: PretrainedConfig, name: str) -> Iterator[str]:
    full, adapted = build(config, lora=False), build(config, lora=True)
    yield ", ".join(filter(None, (name.removesuffix("-Instruct"), SAME.get(name))))
    yield f"{full.num_parameters() / 1e9:.1f} B"
    for model, kind in ((full, "full"), (adapted, "LoRA")):
        shown = [f"{states(model, count):,.0f}" for count in COUNTS[kind]]
        yield from ("<1" if number == "0" else number for number in shown)
    yield from (f"{fewest(full, memory)} / {fewest(adapted, memory)}" for memory in GPUS)


def fewest(model: Any, memory: int) -> int:
    """Return the smallest power of two of GPUs that have room for the states of a model.

    Args:
        model: Model on the meta device with trainable parameters set.
        memory: Memory of a GPU, in GB of the data sheet.
    """
    room = ROOM * usable_bytes(memory) / 2**30
    return next(count for count in (2**power for power in range(20)) if states(model, count) <= room)


if __name__ == "__main__":
    main()
