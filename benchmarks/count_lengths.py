"""Speed of counting the lengths of samples: by the checkpoint's processor, by this package, and from the cache.

    python benchmarks/count_lengths.py [--images 400] [--rows 20000] [--questions 1] [--words 12] [--runs 3]
        [--processor FOLDER]

Writes JPEG files of 0.9 megapixels, and rows with one or more questions and answers about one of them, each row with
different words, into a temporary folder. (Text takes most of our time, and little of the processor's.) Images are
limited to 12544 to 451584 pixels. In turn:

``processor``   the stock processor takes one sample after the other, as the official tool does: its template, pixels
                and tokens (``apply_chat_template(..., tokenize=True)``). Each image once, torch on one thread, where
                its speed per CPU-second is best
``alone``       ours, in one process: a tenth of the rows
``counted``     ours, all rows, with an empty cache, one process per core
``cached``      the same again

Prints one line of JSON: rows per second, and rows per CPU-second (of all processes together: steadier if others use the
machine), medians of the runs; ratios to the processor; and whether both count the same number of tokens in the rows
that both process. FOLDER is a checkpoint or its processor alone; by default a tiny checkpoint with its own vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer is used before processes fork

import numpy as np
import torch
from PIL import Image

from qwenvl.cli.data_args import ToolArguments, open_encoder
from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.data.dataset import ConversationDataset, open_tables
from qwenvl.data.packing.lengths import measure_lengths
from qwenvl.data.types import DatasetSpec
from qwenvl.utils.cores import available_cores

MIN_PIXELS, MAX_PIXELS = 12544, 451584
FILE_PIXELS = 900_000
OURS = ("alone", "counted", "cached")
WORDS = """a the is are on in at of and with man woman dog table picture street sign red blue green large small two
three what where how many which near left right behind front standing sitting holding window water tree shows there
looks probably because people building white black wooden open evening light""".split()


def write_data(folder: Path, images: int, rows: int, questions: int, words: int) -> None:
    """Write images, and ``rows.jsonl`` with questions about them."""
    pixels = np.random.default_rng(0)
    for number in range(images):
        height = int(pixels.integers(700, 1200))
        noise = Image.fromarray(pixels.integers(0, 256, (height // 8, FILE_PIXELS // height // 8, 3), dtype=np.uint8))
        noise.resize((FILE_PIXELS // height, height), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    choose = random.Random(0).choices
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows):
            turns = []
            for turn in range(questions):
                question = " ".join(choose(WORDS, k=8)) + "?"
                turns.append({"from": "human", "value": question if turn else "<image>\n" + question})
                turns.append({"from": "gpt", "value": " ".join(choose(WORDS, k=words)) + "."})
            row = {"id": str(number), "image": f"{number % images}.jpg", "conversations": turns}
            file.write(json.dumps(row) + "\n")


def count_by_processor(processor: Any, folder: Path, rows: int) -> int:
    """Return the number of tokens of the first rows, by the stock processor."""
    tokens = 0
    with (folder / "rows.jsonl").open() as lines:
        for line in [next(lines) for _ in range(rows)]:
            record, messages = json.loads(line), []
            for turn in record["conversations"]:
                text = turn["value"].removeprefix("<image>\n")
                content: list[dict[str, str]] = [{"type": "text", "text": text}]
                if text != turn["value"]:
                    content.insert(0, {"type": "image", "path": str(folder / record["image"])})
                messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
            encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
            tokens += len(encoded["input_ids"][0])
    return tokens


def timed(function: Callable[..., Any], *values: Any) -> tuple[Any, float, float]:
    """Call a function; return its result, its seconds, and the CPU-seconds of this process and its ended children."""
    started, used = time.perf_counter(), cpu_seconds()
    result = function(*values)
    return result, time.perf_counter() - started, cpu_seconds() - used


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(folder: Path, checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all ways in turn, and return the figures."""
    torch.set_num_threads(1)
    flags = ToolArguments(model_name_or_path=str(checkpoint), min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    encoder, processor = open_encoder(flags, 1 << 20)
    processor.image_processor.size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    spec = DatasetSpec("benchmark", (str(folder / "rows.jsonl"),), str(folder))
    tables = open_tables([spec], 0, str(folder / "cache"))
    dataset = ConversationDataset(tables, encoder)
    tenth = ConversationDataset([replace(tables[0], rows=tables[0].rows[: arguments.rows // 10])], encoder)
    some, cache = min(arguments.images, arguments.rows), folder / "cache"
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ("processor", *OURS)}
    for _ in range(arguments.runs):
        expected, *seconds = timed(count_by_processor, processor, folder, some)
        times["processor"].append((some / seconds[0], some / seconds[1]))
        shutil.rmtree(cache / "lengths", ignore_errors=True)
        for way, rows, options in zip(OURS, (tenth, dataset, dataset), ((None, 0), (cache,), (cache,)), strict=True):
            lengths, *seconds = timed(measure_lengths, rows, *options)
            times[way].append((len(rows) / seconds[0], len(rows) / seconds[1]))
        print(
            f"rows per second and per CPU-second: { {way: rates[-1] for way, rates in times.items()} }", file=sys.stderr
        )
    tokens, images = lengths.measures["tokens"], lengths.measures["patches"] // encoder.settings.merge_size**2
    wall, cpu = ({way: statistics.median(rate[k] for rate in rates) for way, rates in times.items()} for k in (0, 1))
    return {
        "benchmark": "count_lengths",
        "images": arguments.images,
        "rows": arguments.rows,
        "tokens_a_row": round(float(tokens.mean()), 1),
        "tokens_of_pictures_a_row": round(float(images.mean()), 1),
        "processes": available_cores(),
        "rows_a_second": {way: round(rate, 1) for way, rate in wall.items()},
        "rows_a_cpu_second": {way: round(rate, 1) for way, rate in cpu.items()},
        "ratio": {way: round(wall[way] / wall["processor"], 1) for way in OURS},
        "ratio_a_cpu_second": {way: round(cpu[way] / cpu["processor"], 1) for way in OURS},
        "equal_tokens": int(tokens[:some].sum()) == expected,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--questions", type=int, default=1, help="questions of each row")
    parser.add_argument("--words", type=int, default=12, help="words of an answer")
    parser.add_argument("--processor", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, checkpoint = Path(folder), arguments.processor or Path(folder) / "checkpoint"
        write_data(data, arguments.images, arguments.rows, arguments.questions, arguments.words)
        if arguments.processor is None:
            build_tiny_checkpoint("qwen3_vl", checkpoint)
        print(json.dumps(compare(data, checkpoint, arguments)))


if __name__ == "__main__":
    main()
