"""Where a run stands in its data after --ignore_data_skip: the epoch begins again once, and the position is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.data.sampler import Sharding
from qwenvl.train.resume.sampler_state import FILE_NAME, Repeats, begins_again, count_repeats, write_position
from tests.e2e.runs import equal_bits, history, train

# 11 rows, 2 a step: 6 steps an epoch.
STEPS: dict[str, Any] = {
    "max_steps": 14,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-9,  # losses say which samples a step had, and not when
    "tune_mm_vision": False,
    "tune_mm_llm": False,
}


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs and two steps."""
    return train(tiny_checkpoint("qwen3_vl"), tmp_path_factory.mktemp("plain") / "run", registry, **STEPS)


def position(checkpoint: Path) -> tuple[int, int]:
    """Return the epoch and the position in it that a checkpoint holds."""
    state = json.loads((checkpoint / FILE_NAME).read_text())
    return state["epoch"], state["position"]


@pytest.mark.parametrize("keep_flag", [False, True], ids=["flag left out", "same command again"])
def test_run_after_an_epoch_that_began_again_trains_every_sample(
    keep_flag: bool, plain: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Steps 3 and 4 begin the first epoch again; whoever resumes from step 4 goes on with its third step."""
    model, losses = tiny_checkpoint("qwen3_vl"), history(plain)
    again = {"resume_from_checkpoint": plain / "checkpoint-2", "ignore_data_skip": True}
    first = train(model, tmp_path / "first", registry, **STEPS, **again)
    expected = [*losses[:2], *losses[:6], *losses[6:12]]
    assert history(first) == pytest.approx(expected, rel=1e-5)
    assert position(first / "checkpoint-4") == (0, 4) and position(first / "checkpoint-8") == (1, 0)
    assert position(first / "checkpoint-10") == (1, 4)
    for step in (4, 8, 10):
        settings = {"resume_from_checkpoint": first / f"checkpoint-{step}", "ignore_data_skip": keep_flag}
        second = train(model, tmp_path / f"second-{step}", registry, **STEPS, **settings)
        assert history(second) == history(first)
        assert equal_bits(second, first)
        assert position(second / "checkpoint-14") == position(first / "checkpoint-14") == (2, 0)


def test_the_epoch_that_a_checkpoint_stands_in_begins_again(
    plain: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    settings = {**STEPS, "resume_from_checkpoint": plain / "checkpoint-8", "ignore_data_skip": True, "data_seed": 7}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    assert position(folder / "checkpoint-12") == (1, 8)
    assert history(folder)[8:] != pytest.approx(history(plain)[6:12], rel=1e-3)  # another order


def _write(folder: Path, step: int, repeats: Repeats) -> str:
    order = {"indices": 11, "indices_per_step": 2, "seed": 42, "rows": "a", "packs": None, "costs": None}
    write_position(folder, order, Sharding(2, 1, 0), step, repeats)
    return str(folder)


@pytest.mark.parametrize(
    ("step", "repeats", "again", "expected"),
    [
        (4, 0, False, 0),
        (4, 0, True, 4),  # epoch 0 begins again
        (8, 0, True, 2),  # epoch 1
        (8, 2, False, 2),
        (10, 4, True, 4),  # at the beginning of epoch 1
        (11, 4, True, 5),  # one step into it
    ],
)
def test_repeated_steps(step: int, repeats: int, again: bool, expected: int, tmp_path: Path) -> None:
    folder = _write(tmp_path, step, Repeats(repeats))
    assert count_repeats(folder, step, 6, again=again) == expected


def test_steps_of_other_data_count_as_the_trainer_counts_them(tmp_path: Path) -> None:
    folder = _write(tmp_path, 9, Repeats(3))
    assert count_repeats(folder, 9, 4, again=True) == 1  # two epochs of four steps, and one more


def test_the_same_command_does_not_begin_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked, other = Repeats(asked=True), Repeats()
    order = json.loads((Path(_write(tmp_path, 4, asked)) / FILE_NAME).read_text())["order"]
    assert not begins_again(str(tmp_path), order)
    assert begins_again(str(tmp_path), {**order, "seed": 7})
    assert "(42, now 7)" in caplog.text
    assert begins_again(_write(tmp_path, 4, other), order)
    (tmp_path / FILE_NAME).unlink()
    assert begins_again(str(tmp_path), order)
