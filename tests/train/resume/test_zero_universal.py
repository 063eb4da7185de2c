"""DeepSpeed's checkpoints go on on another number of ranks as if nothing had happened, or say why they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qwenvl.train.checkpoint.folder import Engine, find_checkpoint
from qwenvl.train.resume.zero_universal import CONVERTED
from qwenvl.utils.errors import UserError
from tests.e2e.runs import REPOSITORY, equal_bits, flags, history, largest_difference, torchrun

pytestmark = pytest.mark.slow

RUNNER = """
import json, sys
from accelerate.state import AcceleratorState
from qwenvl.config import parse_arguments
from qwenvl.train.run import run
from qwenvl.utils.distributed import gather_objects, run_program, shut_down
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import setup_logging

setup_logging("info")
for name, arguments in json.load(open(sys.argv[1])).items():
    try:
        run(parse_arguments(arguments))
    except UserError as error:
        print(f"{name} is refused: {error}")
    gather_objects(None)
    AcceleratorState._reset_state()
shut_down()
run_program(lambda: 0)
"""
# Four samples a step and eleven in all: three steps an epoch, of which the last one is not full.
STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "lr_scheduler_type": "linear",
    "mm_projector_lr": 3e-3,  # groups of parameters with settings of their own
    "adam_epsilon": 1e-2,  # or Adam makes much of rounding where a gradient is nearly zero
}
ON_ONE = {"gradient_accumulation_steps": 4}


def _configuration(stage: int, folder: Path) -> Path:
    settings = json.loads((REPOSITORY / "configs" / f"zero{max(stage, 2)}.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or a tiny model is never sharded
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(settings))
    return path


def _run(folder: Path, commands: Mapping[str, list[str]], ranks: int) -> str:
    """Run command lines one after another in the same processes; return what they said."""
    (folder / f"runner{ranks}.py").write_text(RUNNER)
    (folder / "commands.json").write_text(json.dumps(commands))
    return torchrun(folder / f"runner{ranks}.py", str(folder / "commands.json"), ranks=ranks)


class _Runs:
    """Command lines of runs of one model, each with an output folder of its name."""

    def __init__(self, model: Path, registry: Path, folder: Path) -> None:
        self._model, self._registry, self._folder = model, registry, folder

    def command(self, name: str, stage: int, resume: str | None = None, **extra: Any) -> list[str]:
        checkpoint = self._folder / resume if resume else None
        configuration = _configuration(stage, self._folder)
        settings = {**STEPS, "deepspeed": configuration, "resume_from_checkpoint": checkpoint, **extra}
        return flags(self._model, self._folder / name, self._registry, **settings)


@pytest.mark.parametrize("stages", [(3,), pytest.param((1, 2), marks=pytest.mark.long)], ids=str)
def test_zero_checkpoints_go_on_on_one_rank_and_on_two_again(
    stages: tuple[int, ...], tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Two ranks, after two steps one, after two more two again; against two ranks all the time."""
    pytest.importorskip("deepspeed")
    command = _Runs(tiny_checkpoint("qwen3_vl"), registry, tmp_path).command
    _run(tmp_path, {f"two-{stage}": command(f"two-{stage}", stage) for stage in stages}, ranks=2)

    one = {f"one-{stage}": command(f"one-{stage}", stage, f"two-{stage}/checkpoint-2", **ON_ONE) for stage in stages}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset_use": "held_out"}
    last, checkpoint = stages[-1], f"two-{stages[-1]}/checkpoint-2"
    one["best"] = command("best", last, checkpoint, **ON_ONE, **best)
    one["stage"] = command("stage", 2 if last == 3 else 3, checkpoint, **ON_ONE)
    one["product"] = command("product", last, checkpoint)
    said = _run(tmp_path, one, ranks=1)
    assert said.count("was saved by 2 ranks, and this run has 1. The optimizer's state is converted") == len(stages)
    assert "best is refused: --load_best_model_at_end" in said
    assert f"was saved with ZeRO stage {'3' if last == 3 else '1 or 2'}, and --deepspeed names a configuration" in said
    assert "1 x 2 x 2 = 4, and this run has 2" in said
    assert "Set --per_device_train_batch_size 1 --gradient_accumulation_steps 4;" in said

    again = {f"again-{stage}": command(f"again-{stage}", stage, f"one-{stage}/checkpoint-4") for stage in stages}
    again["same"] = command("same", last, checkpoint)
    assert _run(tmp_path, again, ranks=2).count("was saved by 1 rank, and this run has 2.") == len(stages)
    assert equal_bits(tmp_path / "same", tmp_path / f"two-{last}")  # nothing is converted for as many ranks
    assert history(tmp_path / "same") == history(tmp_path / f"two-{last}")
    for stage in stages:
        two = tmp_path / f"two-{stage}"
        for other in (tmp_path / f"one-{stage}", tmp_path / f"again-{stage}"):
            assert history(other) == pytest.approx(history(two), rel=1e-5), other
            assert history(other, "learning_rate") == history(two, "learning_rate"), other
            assert history(other, "step") == [1, 2, 3, 4, 5, 5], other  # and the summary
            assert largest_difference(other, two) < 1e-5, other
            assert largest_difference(other, two / "checkpoint-4") > 1e-4, other
    assert not list(tmp_path.glob(f"*/{CONVERTED}"))


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_that_cannot_be_converted_is_refused(
    stage: int, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    command = _Runs(tiny_checkpoint("qwen3_vl"), registry, tmp_path).command
    _run(tmp_path, {"two": command("two", stage, optim="sgd", max_steps=2)}, ranks=2)
    said = _run(tmp_path, {"one": command("one", stage, "two/checkpoint-2", **ON_ONE, optim="sgd")}, ranks=1)
    assert "DeepSpeed could not convert it for 1" in said and "Only the state of Adam can be converted" in said
    assert not list(tmp_path.glob(f"*/{CONVERTED}"))


KINDS: dict[str, tuple[str, Engine, str]] = {
    "plain": ("optimizer.pt", "deepspeed", "leave --deepspeed out to resume"),
    "plain for FSDP": ("optimizer.pt", "fsdp", "leave --fsdp out to resume"),
    "deepspeed": ("global_step2/mp_rank_00_model_states.pt", "plain", "resume with --deepspeed and its configuration"),
    "fsdp": ("optimizer.bin", "plain", "resume with --fsdp True and its configuration"),
    "weights alone": ("model.safetensors", "deepspeed", "--save_only_model"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_another_engine_says_how_to_resume_it(kind: str, tmp_path: Path) -> None:
    file, engine, advice = KINDS[kind]
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / file).parent.mkdir(parents=True)
    (checkpoint / file).write_bytes(b"")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    with pytest.raises(UserError) as error:
        find_checkpoint(str(tmp_path), None, engine)
    assert advice in str(error.value) and "--model_name_or_path" in str(error.value)
