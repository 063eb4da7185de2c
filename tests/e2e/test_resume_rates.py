"""A resumed run trains with the learning rates and optimizer settings of its own flags, on every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, SchedulerType, get_scheduler

from qwenvl.models.trainable.freezing import parameter_modules
from qwenvl.train.resume.hyperparameters import STATEFUL_SCHEDULES
from tests.e2e.runs import (
    REPOSITORY,
    equal_bits,
    flags,
    history,
    largest_difference,
    run_on_two_ranks,
    train,
    weights,
)

BEFORE: dict[str, Any] = {
    "dataset_use": "pictures",  # in a step without one, the vision tower stays as it is
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
}
NOW = {
    "learning_rate": 1e-4,
    "vision_tower_lr": 3e-4,
    "mm_projector_lr": 2e-4,
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
}
PEAKS = {"vision": 3e-4, "merger": 2e-4, "language": 1e-4}


def _names(checkpoint: Path) -> list[str]:
    """Return the names of all parameters, in the order in which the optimizer numbers them."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    parts, shapes = parameter_modules(model), {name: value.dim() for name, value in model.named_parameters()}
    return [
        name
        for part in ("vision", "merger", "language")
        for decays in (True, False)
        for name in shapes
        if parts[name] == part and (shapes[name] > 1) == decays
    ]


def _state(checkpoint: Path) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return state


def _step_by_hand(before: Path, after: Path, factor: float) -> dict[str, Tensor]:
    """Return the weights after one step of torch's AdamW with the settings of ``NOW``.

    Its gradients are those of the step, which follow from the first moments before and after.
    """
    names, parts = _names(before), parameter_modules(AutoModelForImageTextToText.from_pretrained(before))
    found, old, new = weights(before), _state(before), _state(after)
    result: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        parameter = torch.nn.Parameter(found[name].clone())
        decay = 0.3 if parameter.dim() > 1 else 0.0
        rate = PEAKS[parts[name]] * factor
        optimizer = torch.optim.AdamW([parameter], lr=rate, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay)
        optimizer.state[parameter] = {key: value.clone() for key, value in old[index].items()}
        parameter.grad = (new[index]["exp_avg"] - 0.8 * old[index]["exp_avg"]) / (1 - 0.8)
        optimizer.step()
        assert torch.allclose(optimizer.state[parameter]["exp_avg_sq"], new[index]["exp_avg_sq"], rtol=1e-2, atol=1e-12)
        result[name] = parameter.detach()
    return result


def test_resumed_steps_are_those_of_torch_with_the_new_settings(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_checkpoint("qwen3_vl")
    earlier = train(model, tmp_path / "earlier", registry, **BEFORE)
    settings = {**BEFORE, **NOW, "resume_from_checkpoint": earlier / "checkpoint-2"}
    resumed = train(model, tmp_path / "resumed", registry, **settings)
    for name, value in NOW.items():
        assert f"{name}: {BEFORE.get(name, _default(name))} -> {value} from step 3 on." in caplog.text
    start = earlier / "checkpoint-2"
    for step, factor in ((3, 0.5), (4, 0.25)):  # the linear schedule has taken half of its four steps
        after = resumed / f"checkpoint-{step}"
        expected, found, before = _step_by_hand(start, after, factor), weights(after), weights(start)
        moved = max(float((found[name] - before[name]).abs().max()) for name in found)
        assert moved > 1e-5
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-3 * 1e-4 * factor), name
        start = after
    assert history(resumed, "learning_rate_vision")[-2:] == pytest.approx([1.5e-4, 0.75e-4])
    assert history(resumed, "learning_rate_language")[-2:] == pytest.approx([0.5e-4, 0.25e-4])
    rates = {group["lr"] for group in torch.load(start / "optimizer.pt", weights_only=True)["param_groups"]}
    assert rates == {0.0} and _peaks(start) == set(PEAKS.values())


def _default(name: str) -> Any:
    return {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-08}.get(name, "not set")


def _peaks(checkpoint: Path) -> set[float]:
    return set(torch.load(checkpoint / "scheduler.pt", weights_only=True)["base_lrs"])


def test_more_epochs_stretch_the_schedule(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that has ended, at the rate 0, goes on at the rate that the longer one has there."""
    settings = {**BEFORE, "max_steps": None, "num_train_epochs": 1, "dataset_use": "text"}
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **settings)
    steps = len(history(folder))
    train(tiny_checkpoint("qwen3_vl"), folder, registry, **{**settings, "num_train_epochs": 2})
    assert f"num_train_epochs: 1 -> 2 from step {steps + 1} on." in caplog.text
    expected = [1e-3 * (1 - step / (2 * steps)) for step in range(steps, 2 * steps)]
    assert history(folder, "learning_rate")[steps:] == pytest.approx(expected)


def test_schedules_are_functions_of_the_step_or_named() -> None:
    """What a resumed run computes anew is computed from the step alone."""
    special = {"warmup_stable_decay": {"num_decay_steps": 2}, "cosine_with_min_lr": {"min_lr_rate": 0.1}}
    special["cosine_warmup_with_min_lr"] = {"min_lr_rate": 0.1}
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=special.get(kind.value, {}),
        )
        follows_the_run = not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        assert follows_the_run == (kind.value in STATEFUL_SCHEDULES), kind


def test_schedule_that_follows_the_run_resumes_exactly(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    evaluation = {"eval_dataset_use": "held_out", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"patience": 0, "threshold": 1}'}
    settings = {**BEFORE, **evaluation, **plateau, "mm_projector_lr": 2e-3}
    full = train(tiny_checkpoint("qwen3_vl"), tmp_path / "full", registry, **settings)
    rates = history(full, "learning_rate_language")
    assert rates[0] > rates[2] > rates[4]
    settings["resume_from_checkpoint"] = full / "checkpoint-3"
    resumed = train(tiny_checkpoint("qwen3_vl"), tmp_path / "resumed", registry, **settings)
    assert equal_bits(resumed, full) and history(resumed, "learning_rate_language") == rates


ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO-2": {"deepspeed": "zero2"},
    "ZeRO-3": {"deepspeed": "zero3"},
    "FSDP2": {"fsdp": True, "fsdp_config": "configs/fsdp2.json"},
}
# A large epsilon, because Adam makes much of rounding where a gradient is small.
SPLIT = {**BEFORE, "per_device_train_batch_size": 1, "save_steps": 2, "adam_epsilon": 1e-2, "learning_rate": 1e-2}
CHANGED = {"learning_rate": 5e-2, "mm_projector_lr": 2e-2, "weight_decay": 0.5, "adam_beta1": 0.5, "max_grad_norm": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_takes_the_new_settings(
    engine: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """DeepSpeed and FSDP load the settings of groups, and DeepSpeed the clipping threshold, from their own files."""
    pytest.importorskip("deepspeed")
    options = {**ENGINES[engine], "ddp_timeout": 60}
    if "deepspeed" in options:
        configuration = json.loads((REPOSITORY / "configs" / f"{options['deepspeed']}.json").read_text())
        if engine == "ZeRO-3":
            configuration["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (tmp_path / "zero.json").write_text(json.dumps(configuration))
        options["deepspeed"] = tmp_path / "zero.json"
    model = tiny_checkpoint("qwen3_vl")
    resume = {"resume_from_checkpoint": tmp_path / "earlier" / "checkpoint-2"}
    commands = {
        "earlier": flags(model, tmp_path / "earlier", registry, **SPLIT, **options),
        "resumed": flags(model, tmp_path / "resumed", registry, **{**SPLIT, **CHANGED, **resume, **options}),
    }
    split = run_on_two_ranks(tmp_path, commands, engine)
    one = {**SPLIT, "gradient_accumulation_steps": 2}
    alone = train(model, tmp_path / "one", registry, **one)
    assert largest_difference(split["earlier"], alone) < 1e-5
    resume = {"resume_from_checkpoint": alone / "checkpoint-2"}
    changed = train(model, tmp_path / "changed", registry, **{**one, **CHANGED, **resume})
    assert largest_difference(changed, alone) > 1e-3
    assert largest_difference(split["resumed"], changed) < 1e-5
