"""Packing and balanced steps: seconds, fill, memory, and the time that ranks wait for each other.

    python benchmarks/packing.py [--samples 100000 1000000] [--seed 0]

Builds a mixture of text, single images, several images and videos as integers (no files), with a long tail of lengths
up to 8192 tokens, and the costs of Qwen3-VL-4B. Prints one line of JSON. The baseline packs first-fit in chunks of 1000
samples in file order and deals packs to the ranks at random, in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from transformers import AutoConfig

from qwenvl.data.bin_packing import Packs, lower_bound, pack
from qwenvl.data.sample_stats import MEASURES
from qwenvl.data.sampler import SampleOrder, Sharding, costs_of_ranks, deal, imbalance
from qwenvl.families import get_family
from qwenvl.profiling.flops import Flops, Trained, training_flops

CAPACITY = 8192
CHUNK = 1000
LONGEST_IMAGE = 1600  # tokens
RUNS = 5


def mixture(count: int, seed: int) -> np.ndarray:
    """Return the measures of a mixture: 40 % text, 35 % one image, 15 % two to eight, 10 % video; longest 8192."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(4, count, p=[0.4, 0.35, 0.15, 0.1])
    text = np.clip(rng.lognormal(5.3, 1.0, count), 16, np.where(kind == 0, CAPACITY, 1500)).astype(np.int64)
    visual, squares = np.zeros(count, np.int64), np.zeros(count, np.int64)
    images = np.select([kind == 1, kind == 2], [1, rng.integers(2, 9, count)], 0)
    for number in range(int(images.max())):
        tokens = np.clip(rng.lognormal(6.0, 0.7, count), 64, LONGEST_IMAGE).astype(np.int64) * (images > number)
        visual += tokens
        squares += (4 * tokens) ** 2
    pairs = rng.integers(2, 33, count) * (kind == 3)
    each = rng.integers(60, 240, count)
    visual += pairs * each
    squares += pairs * (4 * each) ** 2
    measures = np.zeros(count, MEASURES)
    measures["samples"], measures["tokens"] = 1, text + visual
    measures["trained_tokens"], measures["patches"] = np.maximum(text // 2, 1), 4 * visual
    measures["tokens_squared"], measures["patches_squared"] = (text + visual) ** 2, squares
    return measures[measures["tokens"] <= CAPACITY]


def costs_of_4b() -> Flops:
    """Return the operations of Qwen3-VL-4B with every part trained, from the numbers in its config.json."""
    text = {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "vocab_size": 151936}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision)
    config.vision_config.deepstack_visual_indexes = [5, 11, 17]
    return training_flops(config, get_family("qwen3_vl"), Trained())


def first_fit_in_chunks(lengths: np.ndarray, capacity: int) -> Packs:
    """Put each sample into the first pack of its chunk that has room, in file order."""
    packs: list[list[int]] = []
    for start in range(0, len(lengths), CHUNK):
        rooms: list[int] = []
        first = len(packs)
        for index, length in enumerate(lengths[start : start + CHUNK].tolist(), start=start):
            place = next((place for place, room in enumerate(rooms) if room >= length), None)
            if place is None:
                place = len(rooms)
                rooms.append(capacity)
                packs.append([])
            rooms[place] -= length
            packs[first + place].append(index)
    borders = np.cumsum([0, *map(len, packs)])
    return Packs(np.fromiter((index for one in packs for index in one), np.int64, len(lengths)), borders)


def timed(function: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """Return the median of the CPU-seconds of a call, and its result."""
    seconds, result = [], None
    for _ in range(runs):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def peak_mebibytes(function: Callable[[], Any]) -> float:
    """Return the peak of the memory that a call allocates, in MiB."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def packing_figures(measures: np.ndarray, seed: int) -> dict[str, Any]:
    """Measure packing against the baseline."""
    lengths, patches = measures["tokens"].copy(), measures["patches"].copy()
    fewest = lower_bound(lengths, CAPACITY)
    seconds, packs = timed(lambda: pack(lengths, CAPACITY, seed, patches), RUNS)
    plain_seconds, plain = timed(lambda: first_fit_in_chunks(lengths, CAPACITY), 1)
    return {
        "seconds": round(seconds, 3),
        "packs": len(packs),
        "packs_over_lower_bound": len(packs) - fewest,
        "fill": round(float(lengths.sum()) / (len(packs) * CAPACITY), 6),
        "peak_mib": round(peak_mebibytes(lambda: pack(lengths, CAPACITY, seed, patches)), 1),
        "baseline_seconds": round(plain_seconds, 3),
        "baseline_packs_over_lower_bound": len(plain) - fewest,
        "baseline_fill": round(float(lengths.sum()) / (len(plain) * CAPACITY), 6),
        "times_faster": round(plain_seconds / seconds, 1),
    }


def balance_figures(measures: np.ndarray, flops: Flops, ranks: int, seed: int) -> dict[str, Any]:
    """Measure how long ranks wait, with one pack per rank and no accumulation, which is the hardest case.

    ``visual_share_deviation``: standard deviation over steps of the share of visual tokens, a measure of how much steps
    differ in content. It should not exceed that of random packs in random order.
    """
    lengths, sharding = measures["tokens"].copy(), Sharding(1, ranks)
    packs = pack(lengths, CAPACITY, seed, measures["patches"].copy())
    sums = packs.add_up(measures)
    costs = flops.count(sums)
    seconds, order = timed(lambda: SampleOrder(len(packs), seed, costs=costs).steps(0, ranks), RUNS)
    ours = costs_of_ranks(costs, order, sharding)
    random = SampleOrder(len(packs), seed).steps(0, ranks)
    plain = first_fit_in_chunks(lengths, CAPACITY).add_up(measures)
    plain_order = SampleOrder(len(plain), seed).steps(0, ranks)
    full = ours[: len(packs) // ranks]  # in the last round of an epoch, some ranks may have nothing
    worst = full.max(axis=1) / full.mean(axis=1)
    return {
        "slowest_over_mean": round(imbalance(ours), 4),
        "worst_of_100_rounds": round(float(np.quantile(worst, 0.99)), 4),
        "worst_round": round(float(worst.max()), 4),
        "random_order_slowest_over_mean": round(imbalance(costs_of_ranks(costs, random, sharding)), 4),
        "baseline_slowest_over_mean": round(imbalance(costs_of_ranks(flops.count(plain), plain_order, sharding)), 4),
        "visual_share_deviation": round(visual_share_deviation(sums, order, ranks), 4),
        "baseline_visual_share_deviation": round(visual_share_deviation(plain, plain_order, ranks), 4),
        "seconds_an_epoch": round(seconds, 3),
    }


def visual_share_deviation(packs: np.ndarray, order: np.ndarray, size: int) -> float:
    """Return the standard deviation over steps of the share of visual tokens."""
    steps = packs[order[: len(order) // size * size]].reshape(-1, size)
    return float((steps["patches"].sum(axis=1) / 4 / steps["tokens"].sum(axis=1)).std())


def padded_figures(measures: np.ndarray, flops: Flops, seed: int) -> dict[str, Any]:
    """Measure --group_by_cost without packing: 8 ranks, padded batches of 4 rows.

    The figure is the time of the slowest rank of each round, padding included / the time of the same samples without
    padding and waiting.
    """
    sharding = Sharding(4, 8)
    costs = flops.count(measures)
    grouped = SampleOrder(len(measures), seed, costs=costs, lengths=measures["tokens"])
    times = []
    for order in (grouped, SampleOrder(len(measures), seed)):
        steps = order.steps(0, sharding.step_size)
        whole = steps[: len(steps) // sharding.round_size * sharding.round_size]
        ranks = np.stack([deal(whole, replace(sharding, rank=rank)) for rank in range(sharding.world_size)], axis=1)
        rows = measures[ranks]  # [rounds, ranks, rows of a batch]
        longest = rows["tokens"].max(axis=2, keepdims=True)
        rows["tokens"], rows["tokens_squared"] = longest, longest**2
        slowest = flops.count(rows).sum(axis=2).max(axis=1).sum()
        times.append(float(slowest * sharding.world_size / costs[whole].sum()))
    return {"time_over_ideal": round(times[0], 4), "baseline_time_over_ideal": round(times[1], 4)}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    flops = costs_of_4b()
    figures: dict[str, Any] = {"benchmark": "packing", "capacity": CAPACITY}
    for count in arguments.samples:
        print(f"{count} samples ...", file=sys.stderr)
        measures = mixture(count, arguments.seed)
        balance = {str(ranks): balance_figures(measures, flops, ranks, arguments.seed) for ranks in arguments.ranks}
        padded = padded_figures(measures, flops, arguments.seed)
        packing = packing_figures(measures, arguments.seed)
        figures[str(count)] = {**packing, "balance_by_ranks": balance, "group_by_cost_without_packing": padded}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
