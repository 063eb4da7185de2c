"""Cost of the losses by dataset and by sample: CPU-seconds of a step with them over those of a step without.

    python benchmarks/losses.py [--size tiny|2b|4b|8b] [--pack_length 1024] [--samples 24] [--steps 9]

Trains the samples of ``step.py`` in packs, in one process of one thread. Steps with and without the losses take turns,
on the same model and batches. A step with them counts the samples on the host, adds their losses on the device, and
reads and writes them at its end, as with ``--logging_steps 1 --log_sample_losses True`` and a checkpoint at every step.
Prints one line of JSON: medians, and the median ratio of neighbouring steps with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.step import FAMILY, build_model, our_batches
from benchmarks.step_samples import SIZES, make_config, make_samples
from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.forward import install
from qwenvl.models.loss.causal_lm import run_model
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks.objective import Objective, batch_loss, losses_of_samples
from qwenvl.train.dataset_losses import DatasetLosses
from qwenvl.train.records.sample_losses import SampleLosses
from qwenvl.utils.errors import Origin

DATASETS = ("a", "b", "c", "d")


class Records:
    """What the trainer keeps of each step.

    Args:
        folder: Output folder.
    """

    def __init__(self, folder: str) -> None:
        self.of_datasets = DatasetLosses(DATASETS, "trained_tokens", torch.device("cpu"))
        self.of_samples = SampleLosses(folder, wanted=True)
        self.steps = 0

    def backward(self, model: nn.Module, batch: dict[str, Any], trained: float) -> None:
        """Run a batch with its losses."""
        origins = [Origin(DATASETS[line % 4], "file", line + 1) for line in range(batch["num_samples"])]
        self.of_datasets.count(batch, origins)
        self.of_samples.count(batch, origins)
        loss, output = batch_loss(Objective(), model, batch, units=trained)
        losses = losses_of_samples(output, batch)
        self.of_datasets.add(losses, batch)
        self.of_samples.add(losses)
        loss.backward()

    def end_step(self) -> None:
        """Log and write."""
        self.steps += 1
        self.of_datasets.end_step(taken=True)
        self.of_samples.end_step(self.steps, 0, taken=True)
        self.of_datasets.take(lambda values: values)
        self.of_samples.write()


def measure(arguments: argparse.Namespace, folder: str) -> tuple[list[float], list[float]]:
    """Return CPU-seconds of steps without and with the losses, in turns; the first of each is left out."""
    config = make_config(arguments.size)
    samples = make_samples(config, arguments.samples, arguments.pack_length, images=True)
    vision, grey = config.vision_config, torch.full((3,), 127.5)
    model = build_model(config, arguments, "sdpa")
    install(model, Patchify(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, grey, grey))
    attend_by_segments(model, None)
    batches = our_batches(samples, arguments)
    trained = float(sum((sample.tokens.labels != -100).sum() for sample in samples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    records, seconds = Records(folder), ([], [])
    for _ in range(1 + arguments.steps):
        for found, with_losses in zip(seconds, (False, True), strict=True):
            started = time.process_time()
            for batch in batches:
                if with_losses:
                    records.backward(model, batch, trained)
                else:
                    (run_model(model, batch).logits / trained).backward()
            if with_losses:
                records.end_step()
            optimizer.step()
            optimizer.zero_grad()
            found.append(time.process_time() - started)
    return seconds[0][1:], seconds[1][1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pack_length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=9)
    parser.set_defaults(device="cpu", lora_r=0, frozen_vision=False)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        without, with_losses = measure(arguments, folder)
    ratios = [one / other for one, other in zip(with_losses, without, strict=True)]
    report = {
        "family": FAMILY,
        "size": arguments.size,
        "cpu_seconds_without": round(statistics.median(without), 4),
        "cpu_seconds_with": round(statistics.median(with_losses), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(one, 4) for one in statistics.quantiles(ratios, n=4)],
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
