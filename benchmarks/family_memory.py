"""Memory of weights, gradients and optimizer on each GPU, by the published configs of a family and without weights.

    python benchmarks/family_memory.py CONFIG... [--gpus 1 8 32]

CONFIG is a ``config.json`` or a folder with one. Builds each model on torch's meta device and prints a Markdown table:
parameters, and GiB on each GPU of full fine-tuning (language model and merger, bf16 with float32 masters, ZeRO-3) and
of LoRA (rank 64 on the language model, 8 on each stacked expert, frozen weights in bf16, sharded by ZeRO-3 if there are
several GPUs). Activations are not included: ``--dry_run`` counts them for your data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from qwenvl.models.lora.adapters import AdapterSettings, add_adapters
from qwenvl.models.trainable.freezing import set_model
from qwenvl.profiling.state_memory import StateSharding, estimate_states


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 32])
    arguments = parser.parse_args()
    columns = [f"{kind}, {count} GPU{'s' * (count > 1)}" for kind in ("full", "LoRA") for count in arguments.gpus]
    print("| model | parameters |", " | ".join(columns), "|")
    print("|---|---|" + "---|" * len(columns))
    for path in arguments.configs:
        config = AutoConfig.from_pretrained(path)
        full, adapted = build(config, lora=False), build(config, lora=True)
        cells = [f"{states(model, count):,.0f}" for model in (full, adapted) for count in arguments.gpus]
        name = path.parent.name if path.name == "config.json" else path.stem
        print(f"| {name} | {full.num_parameters() / 1e9:.1f} B |", " | ".join(cells), "|")


def build(config: PretrainedConfig, *, lora: bool) -> Any:
    """Return a model of a config on the meta device, with trainable parameters set."""
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    if lora:
        model.requires_grad_(False)
        add_adapters(model, AdapterSettings("language,experts", 64, 128, dropout=0.0))
    else:
        set_model(model, tune_mm_vision=False, tune_mm_mlp=True, tune_mm_llm=True)
    return model


def states(model: Any, ranks: int) -> float:
    """Return GiB of weights, gradients and AdamW on each of ``ranks`` GPUs."""
    sharding = StateSharding("ZeRO-3" if ranks > 1 else "one process", 3 if ranks > 1 else 0, ranks, masters=True)
    found = estimate_states(model, sharding, "adamw_torch", torch.bfloat16, torch.bfloat16)
    return (found.weights + found.gradients + found.optimizer) / 2**30


if __name__ == "__main__":
    main()
