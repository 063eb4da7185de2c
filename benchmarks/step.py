"""Trained tokens per second and peak memory of a training step: packed and chunked, against padded with full logits.

    python benchmarks/step.py [--size tiny|2b|4b|8b] [--pack_length 8192] [--samples 48] [--frozen_vision]
                              [--lora_r 64] [--text] [--attention auto|sdpa] [--steps 3] [--runs 3] [--peak_tflops 989]

Builds a Qwen3-VL of the given size with random weights on the device, and the same samples for all ways: text and
images, many short and some long. Measures an optimizer step of fused AdamW over all samples, with checkpointing; with
``--lora_r``, only adapters of the language model train:

    ours      packs of ``pack_length`` tokens, uint8 pixels, one vision call, loss in chunks of trained tokens
    plain     the stock Trainer's batches: padded rows, as many as fit into ``pack_length`` tokens with their padding,
              float32 patches, the stock forward with labels, full logits
    sorted    the same with samples sorted by length first

Each way runs in its own process, several times in turns. Prints one line of JSON: for each way, medians of seconds per
step, tokens and trained tokens per second, padding, peak memory (of the device; on the CPU, of the process), and MFU if
the peak is given; and the ratios. Stops unless the losses of the ways agree to 1e-2 (bfloat16) or 1e-4 (float32).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen3VLConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.step_samples import SIZES, make_config, make_samples
from qwenvl.data.bin_packing import pack
from qwenvl.data.collator import Collator
from qwenvl.data.encoding.encoded import EncodedSample, Item
from qwenvl.data.media.resize import ImagePlan
from qwenvl.data.sample_stats import MEASURES, measure_row
from qwenvl.data.types import ImageItem
from qwenvl.families import get_family
from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.attention.varlen import torch_kernel
from qwenvl.models.forward import install
from qwenvl.models.loading import choose_attention
from qwenvl.models.lora.adapters import AdapterSettings, adapter_sizes, add_adapters
from qwenvl.models.loss.causal_lm import prepare_inputs
from qwenvl.models.trainable.freezing import configure_checkpointing, set_model
from qwenvl.models.vision.patchify import Patchify
from qwenvl.profiling.flops import Trained, training_flops
from qwenvl.tasks.objective import causal_loss

FAMILY = "qwen3_vl"
WAYS = ("ours", "plain", "sorted")


@dataclass(frozen=True)
class Result:
    """Measurements of one way in one process.

    Args:
        seconds: Seconds of each measured step.
        loss: Loss per trained token in the first step.
        positions: Number of positions in all rows, padding included.
        peak_gib: Peak memory, in GiB.
    """

    seconds: list[float]
    loss: float
    positions: int
    peak_gib: float


def our_batches(samples: list[EncodedSample], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return packs of the samples as the trainer makes them."""
    packs = pack(np.array([len(sample.tokens) for sample in samples]), arguments.pack_length)
    collate = Collator(0, flatten=True)
    return [prepare_inputs(collate([Item((samples[index],)) for index in members])) for members in packs]


def stock_batches(
    samples: list[EncodedSample], arguments: argparse.Namespace, config: Qwen3VLConfig, patchify: Patchify
) -> list[dict[str, Any]]:
    """Return padded batches for stock models, each with as many samples as fit into the length of a pack."""
    longest = max(len(sample.tokens) for sample in samples)
    size = max(1, arguments.pack_length // longest)
    batches = []
    for start in range(0, len(samples), size):
        batch = Collator(0, flatten=False)([Item((sample,)) for sample in samples[start : start + size]])
        stock = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        types = torch.zeros_like(batch["input_ids"], dtype=torch.int)
        types.view(-1)[batch["vision_rows"]] = 1
        stock["mm_token_type_ids"] = types
        if "media" in batch:
            stock["pixel_values"] = patchify(batch["pixels"], batch["media"])
            stock["image_grid_thw"] = torch.tensor([shape[1:] for shape in batch["media"]])
        batches.append(stock)
    return batches


def build_model(config: Qwen3VLConfig, arguments: argparse.Namespace, attention: str) -> PreTrainedModel:
    """Return a model with random weights, created on the device."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=_dtype(device), attn_implementation=attention)
    if arguments.lora_r:
        model.requires_grad_(False)
        add_adapters(model, AdapterSettings("language", arguments.lora_r, 2 * arguments.lora_r, dropout=0.0))
    else:
        set_model(model, tune_mm_vision=not arguments.frozen_vision, tune_mm_mlp=True, tune_mm_llm=True)
    return model.train()


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure(way: str, arguments: argparse.Namespace) -> Result:
    """Train some steps in one of the ways, in this process."""
    torch.set_num_threads(max(1, torch.get_num_threads()))
    config = make_config(arguments.size)
    samples = make_samples(config, arguments.samples, arguments.pack_length, images=not arguments.text)
    vision = config.vision_config
    grey = torch.full((3,), 127.5)
    patchify = Patchify(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, grey, grey)
    device = torch.device(arguments.device)
    attention = choose_attention(arguments.attention, half_precision=device.type == "cuda")
    by_segments = attention in ("sdpa", "varlen")
    model = build_model(config, arguments, "sdpa" if by_segments else attention)
    trained = float(sum((sample.tokens.labels != -100).sum() for sample in samples))
    configure_checkpointing(model, arguments.checkpointing)
    if way == "ours":
        install(model, patchify)
        if by_segments:
            attend_by_segments(model, torch_kernel() if attention == "varlen" else None)
        batches = our_batches(samples, arguments)
    else:
        if way == "sorted":
            samples = sorted(samples, key=lambda sample: len(sample.tokens))
        batches = stock_batches(samples, arguments, config, patchify)
    loss_of = our_loss if way == "ours" else stock_loss
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    losses, seconds = [], []
    for _ in range(1 + arguments.steps):  # the first is not measured
        started = time.perf_counter()
        total = 0.0
        for batch in batches:
            loss = loss_of(model, to_device(batch, device), trained)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))  # waits for the device
        seconds.append(time.perf_counter() - started)
    positions = sum(batch["input_ids"].numel() for batch in batches)
    return Result(seconds[1:], losses[0], positions, peak_gib(device))


def our_loss(model: PreTrainedModel, batch: dict[str, Any], trained: float) -> Tensor:
    """Return a pack's part of the loss, as the trainer computes it."""
    return causal_loss(model, batch, num_trained_tokens=trained)


def stock_loss(model: PreTrainedModel, batch: dict[str, Any], trained: float) -> Tensor:
    """Return a padded batch's part of the loss, as the stock Trainer computes it with a count of items."""
    loss: Tensor = model(**batch, num_items_in_batch=trained, use_cache=False).loss
    return loss


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors to the device, without waiting."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        for key, value in batch.items()
        if key not in ("events", "origins", "error")
    }


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of the device, or of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def count_flops(arguments: argparse.Namespace) -> float:
    """Return the operations of a step, without padding and recomputation."""
    config = make_config(arguments.size)
    trained = Trained(vision=not arguments.frozen_vision)
    if arguments.lora_r:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        add_adapters(model, AdapterSettings("language", arguments.lora_r, 1.0, dropout=0.0))
        trained = Trained(False, False, False, adapter_sizes(model))
    flops = training_flops(config, get_family(FAMILY), trained)
    rows = []
    for sample in make_samples(config, arguments.samples, arguments.pack_length, images=not arguments.text):
        plans = [ImagePlan(ImageItem(""), (0, 0), medium.grid, (0, 0)) for medium in sample.media]
        rows.append(measure_row(len(sample.tokens), int((sample.tokens.labels != -100).sum()), plans))
    return float(flops.count(np.array(rows, MEASURES)).sum())


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function in a new process, where nothing was allocated before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def describe(results: list[Result], tokens: int, trained: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of a way."""
    seconds = statistics.median(second for result in results for second in result.seconds)
    described = {
        "seconds_a_step": round(seconds, 3),
        "tokens_a_second": round(tokens / seconds, 1),
        "trained_tokens_a_second": round(trained / seconds, 1),
        "padding": round(1 - tokens / results[0].positions, 3),
        "peak_gib": round(statistics.median(result.peak_gib for result in results), 2),
    }
    if arguments.peak_tflops:
        described["mfu"] = round(count_flops(arguments) / seconds / arguments.peak_tflops / 1e12, 3)
    return described


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; None for that of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pack_length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--frozen_vision", action="store_true")
    parser.add_argument("--lora_r", type=int, default=0)
    parser.add_argument("--text", action="store_true", help="samples without images")
    parser.add_argument("--checkpointing", choices=("none", "language", "vision", "both"), default="both")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="dense peak of the device; prints MFU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return with_parts(parser.parse_args(given))


def with_parts(arguments: argparse.Namespace) -> argparse.Namespace:
    """Name the checkpointed parts as the trainer does."""
    if arguments.checkpointing == "none":
        arguments.checkpointing = None
    return arguments


def rounds(arguments: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Measure the ways in turns."""
    for _ in range(arguments.runs):
        for way in WAYS:
            yield way, in_new_process(measure, way, arguments)
            gc.collect()


def main() -> None:
    """Measure and print."""
    arguments = parse()
    found: dict[str, list[Result]] = {way: [] for way in WAYS}
    for way, result in rounds(arguments):
        found[way].append(result)
    losses = {way: results[0].loss for way, results in found.items()}
    exactness = 1e-2 if arguments.device.startswith("cuda") else 1e-4
    if max(losses.values()) - min(losses.values()) > exactness * losses["ours"]:
        sys.exit(f"the ways do not compute the same loss: {losses}")
    config = make_config(arguments.size)
    samples = make_samples(config, arguments.samples, arguments.pack_length, images=not arguments.text)
    tokens = sum(len(sample.tokens) for sample in samples)
    trained = int(sum((sample.tokens.labels != -100).sum() for sample in samples))
    described = {way: describe(results, tokens, trained, arguments) for way, results in found.items()}
    ours = described["ours"]
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    report = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": arguments.size,
        "tokens": tokens,
        "trained_tokens": trained,
        "loss": round(losses["ours"], 5),
        **described,
        "times_as_fast": {way: round(ours["tokens_a_second"] / described[way]["tokens_a_second"], 2) for way in WAYS},
        "share_of_memory": {way: round(ours["peak_gib"] / described[way]["peak_gib"], 2) for way in WAYS},
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
