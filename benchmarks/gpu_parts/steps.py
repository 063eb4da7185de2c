"""An optimizer step at published sizes, ours against the stock path and against sorted samples, by ``step.py``."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence

import torch

from benchmarks import step
from benchmarks.gpu_parts.base import Part, Place, Row, require_package
from benchmarks.step_samples import make_config, make_samples
from qwenvl.profiling.device_specs import known_peak

_FLAGS = {
    "text": ["--text"],
    "LoRA": ["--lora_r", "64"],
    "loop": ["--attention", "sdpa"],
    "flash": ["--attention", "flash_attention_2"],
}
"""Flags of ``step.py`` by the words of an item after its size and way. Without one, attention is the best there is."""


def measure(place: Place, item: str) -> Row:
    """Measure one way at one size."""
    size, way, *contents = item.split()
    if "flash" in contents:
        require_package("flash_attn")
    arguments = _arguments(place, size, contents)
    found = step.measure(way, arguments)
    samples = make_samples(make_config(size), arguments.samples, arguments.pack_length, images=not arguments.text)
    tokens = sum(len(sample.tokens) for sample in samples)
    trained = int(sum((sample.tokens.labels != -100).sum() for sample in samples))
    row = step.describe([found], tokens, trained, arguments)
    row["loss"] = round(found.loss, 4)
    row["seconds_spread"] = round(max(found.seconds) / statistics.median(found.seconds) - 1, 3)
    return row


def _arguments(place: Place, size: str, contents: Sequence[str]) -> Namespace:
    """Return the arguments of ``step.py``."""
    given = ["--size", size, "--device", place.device.type, "--runs", "1"]
    given += ["--samples", "6", "--steps", "1"] if place.rehearsal else ["--pack_length", "8192", "--samples", "64"]
    for word in contents:
        given += _FLAGS[word]
    peak = None if place.rehearsal else known_peak(torch.cuda.get_device_name())
    given += ["--peak_tflops", str(peak / 1e12)] if peak else []
    return step.parse(given)


PART = Part(
    (
        *("8b ours", "8b plain", "8b ours text", "4b ours", "2b ours", "2b plain", "8b sorted", "2b sorted"),
        *("8b ours loop", "8b ours flash", "8b ours LoRA"),
    ),
    measure,
    rehearsed=("tiny ours", "tiny ours text", "tiny plain"),
)
