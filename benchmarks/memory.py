"""Peak memory of a training step with each of the flags that reduce it, at real sizes and without a GPU.

    python benchmarks/memory.py [--size tiny|2b|4b|8b] [--pack_length 8192] [--samples 64]

Takes a Qwen3-VL of the given size in bfloat16, and packs of texts and images as in ``benchmarks/step.py``. The step of
the fullest pack runs on torch's meta device, as in ``--dry_run``, which is within 10% of the allocations of a real step
(``tests/train/dry_run/test_preflight.py``). Prints a line of JSON per row: flags; GiB of activations with all temporary
tensors, and their share of the first row's; GiB of weights, gradients and AdamW with DeepSpeed's bf16 on one device and
with ZeRO-3 on eight.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3VLConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.step import our_batches
from benchmarks.step_samples import SIZES, make_config, make_samples
from qwenvl.models.forward import install
from qwenvl.models.lora.adapters import AdapterSettings, add_adapters
from qwenvl.models.trainable.freezing import configure_checkpointing, set_model
from qwenvl.models.vision.patchify import Patchify
from qwenvl.profiling.activation_memory import measure_step
from qwenvl.profiling.state_memory import StateSharding, estimate_states

ROWS: dict[str, dict[str, Any]] = {
    "all parts train": {},
    "--gradient_checkpointing vision": {"parts": "vision"},
    "--gradient_checkpointing language": {"parts": "language"},
    "--gradient_checkpointing both": {"parts": "both"},
    "both, --tune_mm_vision False": {"parts": "both", "vision": False},
    "both, --tune_mm_vision False --tune_mm_llm False": {"parts": "both", "vision": False, "language": False},
    "both, --lora_enable True --lora_r 64": {"parts": "both", "lora": True},
}


def build(config: Qwen3VLConfig, row: dict[str, Any]) -> PreTrainedModel:
    """Return the model of a row on the meta device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    vision, grey = config.vision_config, torch.full((3,), 127.5)
    sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    install(model.train(), Patchify(*sizes, grey, grey))
    if row.get("lora"):
        model.requires_grad_(False)
        add_adapters(model, AdapterSettings("language", 64, 128, dropout=0.0))
    else:
        switches = {"tune_mm_vision": row.get("vision", True), "tune_mm_llm": row.get("language", True)}
        set_model(model, tune_mm_mlp=True, **switches)
    configure_checkpointing(model, row.get("parts"))
    return model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--pack_length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    config = make_config(arguments.size)
    samples = make_samples(config, arguments.samples, arguments.pack_length)
    batch = max(our_batches(samples, arguments), key=lambda one: one["input_ids"].numel())
    first = 0.0
    for name, row in ROWS.items():
        model = build(config, row)
        kinds = torch.bfloat16, torch.bfloat16
        engines = StateSharding("one", 0, 1, masters=True), StateSharding("ZeRO-3", 3, 8, masters=True)
        states = [estimate_states(model, engine, "adamw_torch", *kinds) for engine in engines]
        step = measure_step(model, batch)
        activations = (step.activations + step.logits) / 2**30
        first = first or activations
        totals = [round((one.weights + one.gradients + one.optimizer) / 2**30, 1) for one in states]
        report = {
            "flags": name,
            "activations_gib": round(activations, 2),
            "share": round(activations / first, 2),
            "states_one_device_gib": totals[0],
            "states_zero3_of_8_gib": totals[1],
        }
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
