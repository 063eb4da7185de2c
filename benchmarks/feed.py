"""Samples with an image that a DataLoader worker makes per CPU-second, and bytes that it sends.

    python benchmarks/feed.py [--images 400] [--runs 5] [--max_pixels 451584]

Writes JPEG files of 0.9 megapixels (copies of 20 drawn ones, about as large as photographs), an annotation file and a
tiny Qwen3-VL checkpoint into a temporary folder, and measures these variants in turn, with one thread, each time in a
new process (with a fresh allocator) and with the files in the page cache:

    floor     torchvision's decode_jpeg of bytes in memory, and its uint8 bicubic resize to the same sizes; nothing else
    worker    dataset[index] and collation: annotation, header, chat template, tokens, decoding, resizing
    default   the same with the default settings of the C library's allocator
    stock     the official recipe's work for a sample: an image of Pillow to the processor's apply_chat_template

Prints one line of JSON: samples per CPU-second, the share of the floor, the ratio to the stock path, bytes of a batch
against float32 patches, and minor page faults per image.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoConfig
from transformers.image_utils import load_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.config import DataArguments
from qwenvl.data.collator import Collator
from qwenvl.data.dataset import ConversationDataset, open_tables
from qwenvl.data.encoding.processor import build_encoder, open_processor, with_training_limits
from qwenvl.data.types import DatasetSpec
from qwenvl.families import get_family
from qwenvl.utils.allocator import keep_freed_memory

FAMILY = "qwen3_vl"
ORIGINALS = 20
SIZES = [(768, 1152), (1152, 768), (720, 1280), (880, 1024), (960, 960)]  # height, width
QUESTION = "What is in the picture? Describe it in detail."
ANSWER = "Coloured clouds, soft and wide, with fine grain all over and nothing else that could be named. " * 3
VARIANTS = ("floor", "worker", "default", "stock")


@dataclass(frozen=True)
class Bench:
    """Inputs of the variants."""

    dataset: ConversationDataset
    processor: Any
    files: list[Path]
    sizes: list[tuple[int, int]]

    def prepare(self, variant: str) -> Callable[[int], object]:
        """Return the function to measure, which takes an index."""
        if variant == "floor":
            contents = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in self.files]
            return lambda index: floor(contents[index], self.sizes[index])
        if variant == "stock":
            return lambda index: stock(self.processor, self.files[index])
        collate = Collator(0, flatten=False)
        return lambda index: collate([self.dataset[index]])


def floor(content: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Decode and resize."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.resize(decode_jpeg(content), list(size), interpolation=bicubic, antialias=True)


def stock(processor: Any, file: Path) -> Any:
    """Make a sample as the official recipe does."""
    content = [{"type": "image", "image": load_image(str(file))}, {"type": "text", "text": QUESTION}]
    answer = [{"type": "text", "text": ANSWER}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")


def measure(bench: Bench, variant: str) -> tuple[float, float]:
    """Return samples per CPU-second and minor page faults per sample, after a warm-up."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if variant in ("floor", "worker"):
        keep_freed_memory()
    make = bench.prepare(variant)
    for index in range(min(ORIGINALS, len(bench.files))):
        make(index)
    started, faults = time.process_time(), page_faults()
    for index in range(len(bench.files)):
        make(index)
    return len(bench.files) / (time.process_time() - started), (page_faults() - faults) / len(bench.files)


def page_faults() -> int:
    """Return the number of minor page faults of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def draw(number: int) -> Image.Image:
    """Draw clouds of four sizes, whose JPEG is about as large as a photograph's."""
    generator, (height, width) = np.random.default_rng(number), SIZES[number % len(SIZES)]
    total = np.full((height, width, 3), 128, dtype=np.float32)
    for cells, strength in ((4, 60), (16, 40), (64, 25), (256, 12)):
        coarse = generator.normal(0, strength, (height * cells // 512, width * cells // 512, 3)).astype(np.float32)
        for colour in range(3):
            layer = Image.fromarray(coarse[..., colour]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., colour] += np.asarray(layer)
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def build(folder: Path, images: int, max_pixels: int) -> Bench:
    """Write images, annotations and a checkpoint, and open them as training does."""
    originals = []
    for number in range(min(ORIGINALS, images)):
        draw(number).save(folder / "original.jpg", quality=85)
        originals.append((folder / "original.jpg").read_bytes())
    files = [folder / f"{number}.jpg" for number in range(images)]
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    with (folder / "rows.jsonl").open("w") as rows:
        for number, file in enumerate(files):
            file.write_bytes(originals[number % ORIGINALS])
            rows.write(json.dumps({"id": str(number), "image": file.name, "conversations": turns}) + "\n")
    build_tiny_checkpoint(FAMILY, folder / "checkpoint")
    processor = open_processor(str(folder / "checkpoint"))
    config, limits = AutoConfig.from_pretrained(folder / "checkpoint"), DataArguments(max_pixels=max_pixels)
    encoder = build_encoder(processor, config, get_family(FAMILY), limits, 1 << 20)
    tables = open_tables([DatasetSpec("rows", (str(folder / "rows.jsonl"),), str(folder))], 0, str(folder / "cache"))
    dataset = ConversationDataset(tables, encoder)
    side = encoder.settings.patch_size
    grids = [dataset[index].samples[0].media[0].grid for index in range(len(originals))]
    sizes = [(grid[1] * side, grid[2] * side) for grid in grids]
    saved = with_training_limits(processor, encoder.settings)
    return Bench(dataset, saved, files, [sizes[number % len(sizes)] for number in range(images)])


def batch_bytes(bench: Bench) -> tuple[int, int]:
    """Return the bytes of a batch of one sample, and what they would be with float32 patches instead of pixels."""
    batch = Collator(0, flatten=False)([bench.dataset[0]])
    patches = stock(bench.processor, bench.files[0])["pixel_values"]
    sent = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    return sent, sent - batch["pixels"].nbytes + patches.nbytes


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description="Samples per CPU-second of a DataLoader worker.")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max_pixels", type=int, default=28 * 28 * 576)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # output of libraries
        figures = run(arguments.images, arguments.runs, arguments.max_pixels)
    print(json.dumps({"benchmark": "feed", "images": arguments.images, **figures}))


def run(images: int, runs: int, max_pixels: int) -> dict[str, Any]:
    """Measure every variant ``runs`` times and return the figures."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(
        ["qwenvl.data.dataset", "qwenvl.data.encoding.processor", "qwenvl.cli.make_tiny_checkpoint.command"]
    )
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        bench = build(Path(name), images, max_pixels)
        file_bytes = statistics.mean(file.stat().st_size for file in bench.files)
        sent, with_patches = batch_bytes(bench)
        for number in range(runs):
            for variant in VARIANTS:
                with ProcessPoolExecutor(1, fresh) as process:
                    found[variant].append(process.submit(measure, bench, variant).result())
            print(f"run {number + 1} of {runs}", file=sys.stderr)
    rates, faults = (
        {name: statistics.median(result[which] for result in results) for name, results in found.items()}
        for which in (0, 1)
    )
    return {
        "kilobytes_a_file": round(file_bytes / 1000),
        "samples_per_cpu_second": {name: round(rate, 1) for name, rate in rates.items()},
        "share_of_floor": round(paired(found, "worker", "floor"), 3),
        "ratio": round(paired(found, "worker", "stock"), 2),
        "bytes_a_batch": sent,
        "bytes_a_batch_with_float32_patches": with_patches,
        "ratio_of_bytes": round(with_patches / sent, 2),
        "page_faults_a_picture": {name: round(count) for name, count in faults.items()},
    }


def paired(found: dict[str, list[tuple[float, float]]], one: str, other: str) -> float:
    """Return the median ratio of consecutive runs, as the machine's load changes over time."""
    return statistics.median(a[0] / b[0] for a, b in zip(found[one], found[other], strict=True))


if __name__ == "__main__":
    main()
