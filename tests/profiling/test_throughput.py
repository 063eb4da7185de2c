"""The figures of a log line: exact counts over seconds that tests decide, of batches, ranks and whole runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, TrainerCallback

from qwenvl.config import parse_arguments
from qwenvl.data.collator import Collator
from qwenvl.data.encoding.encoded import EncodedSample, Item, Medium
from qwenvl.data.encoding.tokenization import IGNORE_INDEX, Tokens
from qwenvl.data.sample_stats import MEASURES, NOTHING, Measures, measure_row
from qwenvl.data.sampler import ShardedBatchSampler, Sharding
from qwenvl.families import get_family
from qwenvl.models.loss.causal_lm import prepare_inputs
from qwenvl.profiling.flops import Flops, Trained, training_flops
from qwenvl.profiling.throughput import Throughput, measure_batch
from qwenvl.train.build.data import open_data
from qwenvl.train.build.model import open_model
from qwenvl.train.checkpointing_trainer import Records
from qwenvl.train.run import build_trainer
from qwenvl.train.trainer import Trainer
from tests.e2e.runs import flags, history, train

CPU = torch.device("cpu")
# One operation a unit of each measure, of different sizes, so that each shows in the sum.
FLOPS = Flops({"patches": 1e3, "patches_squared": 1e5}, {"tokens": 1.0, "tokens_squared": 7.0, "trained_tokens": 31.0})


class Clock:
    """A clock that shows what it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sample(length: int, trained: int, grids: tuple[tuple[int, int, int], ...] = ()) -> EncodedSample:
    """A sample with pictures of ``grids``, whose pixels do not matter here."""
    ids = torch.arange(length)
    labels = torch.where(ids >= length - trained, ids, IGNORE_INDEX)
    media = tuple(Medium(torch.zeros((2 * grid[0], 1, 1, 3), dtype=torch.uint8), grid) for grid in grids)
    return EncodedSample(Tokens(ids, labels, ids.expand(4, length), torch.zeros(length).bool()), media)


def measure(one: EncodedSample) -> Measures:
    """What the data stages count of a sample before anything is decoded."""
    trained = int((one.tokens.labels != IGNORE_INDEX).sum())
    return measure_row(len(one.tokens), trained, one.media)  # type: ignore[arg-type]  # has the grids it reads


def add(measures: Iterable[Measures]) -> Measures:
    return reduce(Measures.plus, measures)


def collate(samples: list[EncodedSample], *, flatten: bool) -> dict[str, Any]:
    return prepare_inputs(Collator(0, flatten)([Item((one,)) for one in samples]))


def alone(own: Tensor) -> Tensor:
    """Gather over one rank."""
    return own


GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 300), st.integers(1, 300)), max_size=3)
SAMPLES = st.lists(
    st.integers(2, 90_000).flatmap(lambda n: st.builds(sample, st.just(n), st.integers(1, n - 1), GRIDS.map(tuple))),
    min_size=1,
    max_size=3,
)


@given(SAMPLES, st.booleans())
def test_a_batch_measures_what_its_samples_do(samples: list[EncodedSample], flatten: bool) -> None:
    batch = collate(samples, flatten=flatten)
    assert measure_batch(batch) == add(map(measure, samples))
    together = FLOPS.count(np.array(measure_batch(batch), MEASURES))
    assert together == pytest.approx(sum(FLOPS.count(np.array(measure(one), MEASURES)) for one in samples))


@pytest.mark.parametrize("flatten", [True, False])
def test_a_batch_without_a_usable_sample_counts_as_padding(flatten: bool) -> None:
    batch = prepare_inputs(Collator(0, flatten)([Item(), Item()]))
    assert measure_batch(batch) == NOTHING
    throughput, clock = Throughput(FLOPS, None, CPU), Clock()
    throughput.count(batch)
    clock.now = 1
    found = throughput.take(alone)
    assert found["samples_per_second"] == found["tokens_per_second"] == 0
    assert found["padding_share"] == 1


def test_figures_are_counts_over_the_seconds_of_the_clock() -> None:
    clock = Clock()
    throughput = Throughput(FLOPS, 1e6, CPU, clock)
    samples = [sample(10, 3, ((1, 4, 6),)), sample(6, 2)]
    throughput.run()
    with throughput.waiting():
        clock.now += 1
    throughput.count(collate(samples, flatten=False))
    throughput.count(collate(samples, flatten=False))
    clock.now += 2
    with throughput.paused():
        clock.now += 500
    clock.now += 1
    vision, language = 2 * (24e3 + 576e5), 2 * (16 + 7 * 136 + 31 * 5)
    assert throughput.take(alone) == {
        "tokens_per_second": 8,
        "trained_tokens_per_second": 2.5,
        "samples_per_second": 1,
        "tokens_per_second_per_device": 8,
        "trained_tokens_per_second_per_device": 2.5,
        "padding_share": 0.2,
        "data_wait_share": 0.25,
        "mfu": pytest.approx((vision + language) / 4e6, rel=1e-4),
        "mfu_vision": pytest.approx(vision / 4e6, rel=1e-4),
        "mfu_language": pytest.approx(language / 4e6, rel=1e-4),
    }
    throughput.count(collate(samples, flatten=True))
    clock.now += 16
    again = throughput.take(alone)
    assert (again["tokens_per_second"], again["padding_share"], again["data_wait_share"]) == (1, 0, 0)


def test_the_clock_stands_still_until_the_first_batch_and_where_training_begins_again() -> None:
    clock = Clock()
    throughput = Throughput(FLOPS, None, CPU, clock)
    for _ in range(2):
        clock.now += 100
        with throughput.paused():
            clock.now += 100
        throughput.run()
        throughput.run()
        throughput.count(collate([sample(10, 3)], flatten=True))
        clock.now += 5
        assert throughput.take(alone)["tokens_per_second"] == 2
        throughput.count(collate([sample(10, 3)], flatten=True))
        clock.now += 5
        throughput.start_over()


def test_ranks_add_up_and_the_slowest_decides() -> None:
    clocks = Clock(), Clock()
    ranks = [Throughput(FLOPS, 1e6, CPU, clock) for clock in clocks]
    for rank, clock, length in zip(ranks, clocks, (30, 10), strict=True):
        rank.run()
        rank.count(collate([sample(length, 5), sample(10, 5)], flatten=False))
        with rank.waiting():
            clock.now += 1 if length == 30 else 2
        clock.now += 4 if length == 30 else 2
    rows: list[Tensor] = []
    ranks[0].take(lambda own: rows.append(own) or own)  # type: ignore[func-returns-value]
    found = ranks[1].take(lambda own: torch.cat([*rows, own]))
    assert found["tokens_per_second"] == 60 / 5
    assert found["tokens_per_second_per_device"] == 60 / 5 / 2
    assert found["samples_per_second"] == 4 / 5
    assert found["padding_share"] == 0.25
    assert (found["data_wait_share"], found["data_wait_share_max"]) == (0.35, 0.5)
    assert found["mfu"] == pytest.approx((60 + 7 * 1200 + 31 * 20) / 5 / 2e6, rel=1e-4)


class _Evaluated(TrainerCallback):
    """Counts the batches of evaluations."""

    def __init__(self) -> None:
        self.batches = 0

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.batches += 1


PEAK = 2.0  # TFLOP/s
SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "logging_steps": 2,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_dataset_use": "held_out",
    "save_strategy": "steps",
    "save_steps": 1,
    "tune_mm_vision": False,
    "device_peak_tflops": PEAK,
}


def _trainer(command: list[str], checkpoint: Path) -> tuple[Trainer, list[Measures]]:
    """Return a trainer whose steps take a second each, saving and evaluating a thousand; and what each step holds."""
    parsed = parse_arguments(command)
    config = AutoConfig.from_pretrained(checkpoint)
    data = open_data(parsed, get_family("qwen3_vl"), config)
    trainer = build_trainer(
        parsed, open_model(parsed, data.processor, config, data.added_tokens), data, Records("", {})
    )
    evaluated, output = _Evaluated(), Path(parsed.training.output_dir)
    trainer.add_callback(evaluated)
    trainer.speed.throughput.clock = lambda: (
        trainer.state.global_step + 1000.0 * evaluated.batches + 1000.0 * len(list(output.glob("checkpoint-*")))
    )
    batches = list(ShardedBatchSampler(data.order, Sharding(2, accumulation=2)))
    steps = [chain(*batches[number : number + 2]) for number in range(0, len(batches), 2)]
    return trainer, [add(measure(one) for index in step for one in data.train[index].samples) for step in steps]


def _lines(trainer: Trainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_a_run_logs_what_its_steps_hold_whatever_else_it_does(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Evaluation and saving take a thousand seconds each, in the middle of what a line covers; resumed as well."""
    checkpoint = tiny_checkpoint("qwen3_vl")
    command = flags(checkpoint, tmp_path / "out", registry, **SETTINGS)
    trainer, steps = _trainer(command, checkpoint)
    trainer.train()
    flops = training_flops(trainer.model.config, get_family("qwen3_vl"), Trained(vision=False))
    assert trainer.speed.throughput.clock() > 10_000
    assert len(steps) == 3  # of the first epoch
    lines = _lines(trainer)
    _check_line(lines[0], add(steps[:2]), flops)
    assert trainer.state.total_flos == pytest.approx(2 * flops.count(np.array(add(steps), MEASURES)))
    resumed, _ = _trainer([*command, "--output_dir", str(tmp_path / "resumed")], checkpoint)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    figures = {name for name in lines[-1] if "second" in name or "mfu" in name or "share" in name}
    assert {"mfu_vision", "padding_share", "data_wait_share"} < figures
    assert {name: _lines(resumed)[-1][name] for name in figures} == {name: lines[-1][name] for name in figures}


def _check_line(line: dict[str, float], held: Measures, flops: Flops) -> None:
    vision, language = (float(part) for part in flops.split(np.array(held, MEASURES)))
    assert line["tokens_per_second"] == pytest.approx(held.tokens / 2, rel=1e-4)
    assert line["trained_tokens_per_second"] == pytest.approx(held.trained_tokens / 2, rel=1e-4)
    assert line["samples_per_second"] == pytest.approx(held.samples / 2, rel=1e-4)
    assert line["mfu"] == pytest.approx((vision + language) / (2 * PEAK * 1e12), rel=1e-4)
    assert line["mfu_vision"] == pytest.approx(vision / (2 * PEAK * 1e12), rel=1e-4)
    assert line["mfu_language"] == pytest.approx(language / (2 * PEAK * 1e12), rel=1e-4)
    assert 0 < line["padding_share"] < 1
    assert line["data_wait_share"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU may be a known one")
def test_without_a_known_peak_mfu_is_left_out_and_that_is_said_once(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "qwenvl"):
        folder = train(tiny_checkpoint("qwen3_vl"), tmp_path, registry, max_steps=2, dataset_use="text")
    assert sum("MFU is left out" in record.getMessage() for record in caplog.records) == 1
    assert not history(folder, "mfu")
    assert not history(folder, "peak_memory_gib")
    assert len(history(folder, "tokens_per_second")) == 2
