"""Which batches the trainer is fed with, and where a resumed run goes on."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import equal_bits, flags, history, open_trainer, train

EVALUATION = {"eval_strategy": "steps", "per_device_eval_batch_size": 3}


def origins(loader: Any) -> list[list[int]]:
    """Return the rows of each batch of a loader, by their numbers in the file."""
    return [[origin.line for origin in batch["origins"]] for batch in loader]


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """The checkpoint that the runs here start from."""
    return tiny_checkpoint("qwen3_vl")


def test_evaluation_takes_the_rows_in_their_order_and_its_own_batch_size(
    model: Path, registry: Path, tmp_path: Path
) -> None:
    trainer = open_trainer(model, tmp_path, registry, eval_dataset_use="mixed", **EVALUATION)
    (*whole, last) = origins(trainer.get_eval_dataloader())
    first = whole[0][0]
    assert [*itertools.chain(*whole), *last] == list(range(first, first + 11))
    assert {len(batch) for batch in whole} == {3} and len(last) == 2
    other = open_trainer(model, tmp_path, registry, eval_dataset_use="held_out", **EVALUATION)
    assert [len(batch) for batch in origins(trainer.get_eval_dataloader(other.eval_dataset))] == [3, 1]


def test_training_takes_every_row_once_an_epoch_in_an_order_of_its_seed(
    model: Path, registry: Path, tmp_path: Path
) -> None:
    runs = [
        origins(open_trainer(model, tmp_path, registry, **seed).get_train_dataloader())
        for seed in ({}, {"data_seed": 1}, {"data_seed": 1, "seed": 5})
    ]
    rows = [list(itertools.chain(*batches)) for batches in runs]
    assert all(len(set(order)) == 11 and order != sorted(order) for order in rows)
    assert rows[0] != rows[1] == rows[2]
    assert [len(batch) for batch in runs[0]] == [2, 2, 2, 2, 2, 1]


def test_the_position_counts_the_batch_size_that_was_found(model: Path, registry: Path, tmp_path: Path) -> None:
    trainer = open_trainer(model, tmp_path / "out", registry, gradient_accumulation_steps=2)
    trainer._train_batch_size = 1  # as --auto_find_batch_size leaves it; the flag says 2
    trainer.state.global_step = 3
    trainer.save_position(tmp_path)
    state = json.loads((tmp_path / "sampler_state.json").read_text())
    assert (state["batch_size"], state["accumulation"], state["position"]) == (1, 2, 6)
    assert state["order"]["indices_per_step"] == 2
    assert [len(batch) for batch in origins(trainer.get_train_dataloader())] == [1] * 11


@pytest.mark.parametrize(
    ("again", "repeats", "expected", "then"),
    [(False, 0, (1, 4), 0), (False, 1, (1, 2), 1), (True, 0, (1, 0), 2), (True, 3, (0, 0), 5)],
)
def test_a_run_goes_on_at_its_micro_batch(
    again: bool, repeats: int, expected: tuple[int, int], then: int, model: Path, registry: Path, tmp_path: Path
) -> None:
    """After five steps, in epochs of three steps of two micro-batches; some of them had been repeated."""
    trainer = open_trainer(
        model, tmp_path / "out", registry, gradient_accumulation_steps=2, ignore_data_skip=again, save_only_model=True
    )
    assert trainer._init_training_state(10, 3, 4, None, None) == (0, 0)
    trainer.state.global_step = 5
    trainer._repeats = replace(trainer._repeats, steps=repeats)
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    trainer.save_position(tmp_path)
    assert trainer._init_training_state(10, 3, 4, str(tmp_path), None) == expected
    trainer.save_position(tmp_path)
    state = json.loads((tmp_path / "sampler_state.json").read_text())
    assert (state["repeated_steps"], state["ignore_data_skip"]) == (then, again)


def test_a_resumed_run_goes_on_with_the_batch_size_that_was_found(
    model: Path, registry: Path, tmp_path: Path, fail: Callable[[list[str]], str]
) -> None:
    """A run of batches of two, as found by one whose flag says four; the same command goes on from its checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    whole = train(model, tmp_path / "whole", registry, **settings, per_device_train_batch_size=2)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    larger = {**settings, "per_device_train_batch_size": 4}
    message = fail(flags(model, tmp_path / "resumed", registry, **larger))
    assert "accumulation 2 x 1 x 1 = 2, and this run has 4" in message
    resumed = train(model, tmp_path / "resumed", registry, **larger, auto_find_batch_size=True)
    assert history(resumed) == history(whole)
    assert equal_bits(resumed, whole)
