"""Where a run stands in its data, and when another one may go on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenvl.data.sampler import SampleOrder, Sharding
from qwenvl.train.resume.sampler_state import (
    FILE_NAME,
    Repeats,
    begins_again,
    count_repeats,
    describe_order,
    read_batch_size,
    require_same_order,
    write_position,
)
from qwenvl.utils.errors import UserError
from tests.e2e.runs import equal_bits, flags, history, open_trainer, train

CONTENT = {"rows": "abc", "packs": None}
COSTS = np.array([1.0, 2.0, 4.0])


def describe(step_size: int = 4, content: dict[str, str | None] = CONTENT, **order: Any) -> dict[str, Any]:
    return describe_order(SampleOrder(**{"num_samples": 11, "seed": 5, **order}), step_size, content)


def test_an_order_is_described_by_all_that_decides_it() -> None:
    assert describe() == {"indices": 11, "indices_per_step": 4, "seed": 5, "costs": None, **CONTENT}
    assert json.loads(json.dumps(describe(costs=COSTS))) == describe(costs=COSTS)
    known = [
        describe(**given)["costs"]
        for given in (
            {"costs": COSTS},
            {"costs": COSTS * 2},
            {"costs": COSTS, "lengths": np.array([1, 2, 3])},
            {"costs": COSTS, "lengths": np.array([1, 2, 4])},
            {"lengths": np.array([1, 2, 4])},
        )
    ]
    assert None not in known and len(set(known)) == len(known)


@pytest.mark.parametrize(
    ("step", "epoch", "position"), [(0, 0, 0), (1, 0, 4), (2, 0, 8), (3, 1, 0), (4, 1, 4), (9, 3, 0)]
)
def test_the_place_is_counted_in_steps_of_an_epoch_that_ends_with_a_short_one(
    step: int, epoch: int, position: int, tmp_path: Path
) -> None:
    write_position(tmp_path, describe(), Sharding(2, 1, 0, 2), step)
    state = json.loads((tmp_path / FILE_NAME).read_text())
    assert (state["epoch"], state["position"]) == (epoch, position)
    assert (state["batch_size"], state["world_size"], state["accumulation"]) == (2, 1, 2)
    assert state["order"] == describe()
    assert (state["repeated_steps"], state["ignore_data_skip"]) == (0, False)


def test_the_batch_size_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    assert read_batch_size(str(tmp_path)) is None
    write_position(tmp_path, describe(), Sharding(2, 1, 0, 2), 1)
    assert read_batch_size(str(tmp_path)) == 2


@pytest.mark.parametrize(("repeats", "epoch", "position"), [(2, 1, 8), (5, 0, 8), (3, 1, 4)])
def test_repeated_steps_are_no_progress(repeats: int, epoch: int, position: int, tmp_path: Path) -> None:
    """Of seven steps, in epochs of three."""
    write_position(tmp_path, describe(), Sharding(2, 1, 0, 2), 7, Repeats(repeats, asked=True))
    state = json.loads((tmp_path / FILE_NAME).read_text())
    assert (state["epoch"], state["position"]) == (epoch, position)
    assert (state["repeated_steps"], state["ignore_data_skip"]) == (repeats, True)


@pytest.mark.parametrize(
    ("steps_of_epoch", "again", "repeated"),
    [
        (3, False, 2),  # as in the checkpoint
        (3, True, 4),  # five of the seven are progress, of which the second epoch's two are repeated
        (5, False, 2),
        (5, True, 2),  # with another number, seven steps are one epoch and two steps of the next
    ],
)
def test_what_is_repeated_is_counted_from_the_last_border(
    steps_of_epoch: int, again: bool, repeated: int, tmp_path: Path
) -> None:
    write_position(tmp_path, describe(), Sharding(2, 1, 0, 2), 7, Repeats(2))
    assert count_repeats(str(tmp_path), 7, steps_of_epoch, again=again) == repeated


def test_a_checkpoint_that_does_not_say_has_repeated_nothing(tmp_path: Path) -> None:
    assert count_repeats(str(tmp_path), 7, 3, again=False) == 0
    assert count_repeats(str(tmp_path), 7, 3, again=True) == 1
    assert begins_again(str(tmp_path), describe())


@pytest.mark.parametrize(
    ("asked", "seed", "again"), [(False, 5, True), (True, 5, False), (True, 6, True), (False, 6, True)]
)
def test_an_epoch_begins_again_once_for_each_change(
    asked: bool, seed: int, again: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same command, started again by a scheduler, goes on."""
    write_position(tmp_path, describe(), Sharding(2, 1, 0, 2), 7, Repeats(2, asked=asked))
    assert begins_again(str(tmp_path), describe(seed=seed)) == again
    assert ("the epoch begins again, as --ignore_data_skip asks for." in caplog.text) == again
    assert ("What differs: --data_seed, or --seed without it (5, now 6)." in caplog.text) == (seed == 6)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A checkpoint of 4 x 2 x 3 = 24 indices a step."""
    write_position(tmp_path, describe(24, costs=COSTS), Sharding(4, 2, 0, 3), 7)
    return str(tmp_path)


def test_the_same_order_and_checkpoints_that_do_not_say_are_taken(saved: str, tmp_path: Path) -> None:
    require_same_order(saved, describe(24, costs=COSTS))
    (tmp_path / FILE_NAME).unlink()
    require_same_order(saved, describe(3))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_samples": 12}, ["samples or packs in an epoch (11, now 12)"]),
        ({"seed": 6}, ["--data_seed, or --seed without it (5, now 6)"]),
        ({"costs": None}, ["what samples cost (lengths, --group_by_cost"]),
        ({"content": {**CONTENT, "rows": "abd"}}, ["the datasets, their content, or which of their rows are used."]),
        ({"content": {**CONTENT, "packs": "x"}}, ["how rows are packed (--data_packing, --packing_plan, lengths)."]),
        ({"seed": 6, "step_size": 8}, ["batch size x ranks x accumulation (24, now 8); --data_seed"]),
    ],
    ids=str,
)
def test_another_order_is_refused_with_what_differs(changed: dict[str, Any], words: list[str], saved: str) -> None:
    with pytest.raises(UserError) as caught:
        require_same_order(saved, describe(**{"step_size": 24, "costs": COSTS, **changed}))
    message = str(caught.value)
    words += [saved, "inside an epoch", "training_args.yaml", "--ignore_data_skip True"]
    assert all(word in message for word in words), message
    assert ("; " in message.partition("What differs: ")[2].partition(". Resume")[0]) == (len(changed) > 1)


@pytest.mark.parametrize(
    ("ranks", "advice"),
    [
        (1, "--per_device_train_batch_size 4 --gradient_accumulation_steps 6"),
        (3, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
        (8, "--per_device_train_batch_size 3 --gradient_accumulation_steps 1"),
        (24, "--per_device_train_batch_size 1 --gradient_accumulation_steps 1"),
        (5, "No setting gives steps of 24 on 5 ranks"),
    ],
)
def test_another_number_of_samples_in_a_step_is_refused_with_the_flags_for_the_same(
    ranks: int, advice: str, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError) as caught:
        require_same_order(saved, describe(8, costs=COSTS))
    assert "accumulation 4 x 2 x 3 = 24, and this run has 8" in str(caught.value)
    assert advice in str(caught.value) and "--ignore_data_skip True" in str(caught.value)


@pytest.fixture
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    """The checkpoint that the runs here start from."""
    return tiny_checkpoint("qwen3_vl")


def test_the_position_counts_the_batch_size_that_was_found(model: Path, registry: Path, tmp_path: Path) -> None:
    trainer = open_trainer(model, tmp_path / "out", registry, gradient_accumulation_steps=2)
    trainer._train_batch_size = 1  # as --auto_find_batch_size leaves it; the flag says 2
    trainer.state.global_step = 3
    trainer.save_position(tmp_path)
    state = json.loads((tmp_path / "sampler_state.json").read_text())
    assert (state["batch_size"], state["accumulation"], state["position"]) == (1, 2, 6)
    assert state["order"]["indices_per_step"] == 2
    assert [len(batch["origins"]) for batch in trainer.get_train_dataloader()] == [1] * 11


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
    trainer.position._repeats = Repeats(repeats, asked=again)
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
