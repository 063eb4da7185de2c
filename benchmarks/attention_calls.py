"""Calls of attention in a micro-batch, per sample against in one call a layer; on a CPU.

    python benchmarks/attention_calls.py [--size tiny|2b|4b|8b] [--samples 100] [--layers 2]

Trains one flattened row of many samples, half with an image, twice in float32 with gradient checkpointing: with
the loop of ``--attn_implementation sdpa``, and with a stand-in for the varlen kernel of torch, which needs CUDA.
torch's profiler counts calls of attention, forward and backward, and operators in all; each is one launch or more on a
GPU. Counts per layer do not depend on the number of layers. Prints a line of JSON for each way, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForImageTextToText, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.step_samples import SIZES, make_config, make_samples
from qwenvl.data.collator import Collator
from qwenvl.data.encoding.encoded import Item
from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.forward import install
from qwenvl.models.loss.causal_lm import prepare_inputs
from qwenvl.models.trainable.freezing import configure_checkpointing
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks.objective import causal_loss

# of SDPA on a CPU, and of the stand-in
_FORWARD = ("aten::scaled_dot_product_attention", "varlen")
_BACKWARD = ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "varlen backward")


class _Varlen(torch.autograd.Function):
    """Returns tensors of the right shapes, for a kernel of which only the calls are counted."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        with record_function("varlen"):
            return torch.zeros_like(query)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        with record_function("varlen backward"):
            return tuple(torch.zeros_like(part) for part in ctx.saved_tensors)


def stand_in(query: Tensor, key: Tensor, value: Tensor, *borders: Any, **options: Any) -> Tensor:
    """Return what a varlen kernel returns, without the numbers."""
    found: Tensor = _Varlen.apply(query, key, value)
    return found


def build(arguments: argparse.Namespace, kernel: Any) -> PreTrainedModel:
    """Return a model with random weights and few layers, all parts trained with checkpointing."""
    config = make_config(arguments.size)
    config.text_config.num_hidden_layers = arguments.layers
    config.vision_config.depth = arguments.layers
    config.vision_config.deepstack_visual_indexes = [0]
    config.text_config.vocab_size = 1024  # its projection is not what is counted
    vision, grey = config.vision_config, torch.full((3,), 127.5)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").train()
    install(model, Patchify(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, grey, grey))
    attend_by_segments(model, kernel)
    configure_checkpointing(model, "both")
    return model


def count(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, int]:
    """Return the calls of one micro-batch."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        causal_loss(model, batch, num_trained_tokens=1.0).backward()
    events = list(profiler.events())
    return {
        "forward": sum(event.name in _FORWARD for event in events),
        "backward": sum(event.name in _BACKWARD for event in events),
        "operators": sum(event.name.startswith("aten::") for event in events),
    }


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    samples = make_samples(make_config(arguments.size), arguments.samples, 256)
    batch = prepare_inputs(Collator(0, flatten=True)([Item((sample,)) for sample in samples]))
    shown = {"samples": arguments.samples, "images": len(batch.get("media", ())), "layers": arguments.layers}
    counts = {}
    for way, kernel in (("one call per sample", None), ("one call per layer", stand_in)):
        counts[way] = count(build(arguments, kernel), batch)
        print(json.dumps({"way": way, **shown, **counts[way]}), flush=True)
    before, after = counts.values()
    print(json.dumps({"ratio": {name: round(before[name] / after[name], 1) for name in before}}), flush=True)


if __name__ == "__main__":
    main()
