"""``--dry_run``: what it finds, and how near its figures come to the run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from qwenvl.config import parse_arguments
from qwenvl.data.collator import for_model
from qwenvl.families import FAMILIES, get_family
from qwenvl.profiling.activation_memory import measure_step
from qwenvl.profiling.state_memory import StateMemory, StateSharding, estimate_states
from qwenvl.tasks.objective import causal_loss
from qwenvl.train.build.data import open_config, open_data
from qwenvl.train.build.model import open_model, weight_types
from qwenvl.train.checkpointing_trainer import Records
from qwenvl.train.dry_run.preflight import warn_of_loading
from qwenvl.train.run import build_trainer
from qwenvl.train.train_qwen import main
from tests.e2e.runs import LORA, REPOSITORY, flags, train, weights


def dry_run(caplog: pytest.LogCaptureFixture, command: list[str]) -> str:
    caplog.clear()
    assert main([*command, "--dry_run"]) == 0
    return next(record.getMessage() for record in caplog.records if record.message.startswith("Dry run"))


@pytest.mark.parametrize("family", FAMILIES)
def test_says_what_the_run_will_be_and_trains_nothing(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: Any
) -> None:
    settings = {"max_steps": None, "num_train_epochs": 4, "per_device_train_batch_size": 3, "dataset_use": "mixed,text"}
    text = dry_run(caplog, flags(tiny_checkpoint(family), tmp_path / "out", registry, **settings))
    assert re.search(r"^mixed +11 +100% +11 +-$", text, re.MULTILINE)
    assert re.search(r"^mixed +11 +\d[\d,]+ .* 0$", text, re.MULTILINE)
    assert re.search(r"^all +14 +\d[\d,]+ .* 0$", text, re.MULTILINE)
    assert "20 in all, 5 per epoch: 4.00 epochs" in text
    assert "3 rows: 1 device (cpu) x batches of 3 x 1 accumulated" in text
    assert not list((tmp_path / "out").iterdir())
    state = json.loads(
        (train(tiny_checkpoint(family), tmp_path / "run", registry, **settings) / "trainer_state.json").read_text()
    )
    assert state["max_steps"] == 20
    flop = float(re.search(r"([\d.e+]+) FLOP", text)[1])
    assert flop == pytest.approx(state["total_flos"], rel=1e-2)  # as printed, to three digits


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload", "zero2", "fsdp2"])
def test_engines_share_out_the_memory_without_a_launcher(
    engine: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: Any
) -> None:
    file = str(REPOSITORY / "configs" / f"{engine}.json")
    settings = {"fsdp": True, "fsdp_config": file} if engine == "fsdp2" else {"deepspeed": file}
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **settings, dry_run_devices=4, bf16=True)
    text = dry_run(caplog, command)
    parameters = sum(tensor.numel() for tensor in weights(tiny_checkpoint("qwen3_vl")).values())
    found = {name: float(size) for name, size in re.findall(r"(?m)^(\w+) +([\d.]+) MiB", text)}
    expected = {  # bytes of a parameter on each of four devices
        "zero2": (2, 4 / 4, 12 / 4),
        "zero3": (2 / 4, 4 / 4, 12 / 4),
        "zero3_offload": (0, 4 / 4, 0),
        "fsdp2": (4 / 4, 4 / 4, 8 / 4),
    }[engine]
    buffers = re.search(r"(?m)^16-bit copies of weights, buffers +([\d.]+) (MiB|GiB)", text)
    assert buffers is not None and (float(buffers[1]) > 0), "a tiny model fits whole into buffers"
    for name, each in zip(("weights", "gradients", "optimizer"), expected, strict=True):
        assert found[name] == pytest.approx(parameters * each / 2**20, abs=0.06), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True, "data_flatten": True},
        {"data_packing": True, "model_max_length": 512, "tune_mm_vision": False},
        {**LORA, "gradient_checkpointing": "language"},
    ],
    ids=["padded", "checkpointed", "frozen", "adapters"],
)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_memory_is_what_a_real_step_takes(
    family: str, settings: dict[str, Any], tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Held against the allocations that torch's profiler sees in a real step on the CPU, in training mode."""
    command = flags(tiny_checkpoint(family), tmp_path / "out", registry, **settings)
    parsed = parse_arguments(command)
    config = open_config(parsed)
    data = open_data(parsed, get_family(family), config)
    trainer = build_trainer(
        parsed, open_model(parsed, data.processor, config, data.added_tokens), data, Records("", {})
    )
    batch = next(iter(trainer.get_train_dataloader()))
    batch, model = for_model(batch), trainer.model.train()
    again = parse_arguments(command)  # opening a model takes gradient checkpointing out of the arguments
    on_meta = open_model(again, data.processor, config, data.added_tokens, on_meta=True)
    step = measure_step(on_meta, batch)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        causal_loss(model, batch, num_trained_tokens=1.0).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert step.activations + step.logits == pytest.approx(allocated.max(), rel=0.1)
    states = estimate_states(on_meta, StateSharding("one process", 0, 1), "adamw_torch", *weight_types(parsed))
    assert states.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert states.gradients == sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    optimizer = trainer.create_optimizer()
    optimizer.step()
    sizes = [value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert states.optimizer == sum(sizes)


def test_checkpointing_lowers_the_activations_of_the_dry_run(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: Any
) -> None:
    found = []
    for checkpointed in (False, True):
        caplog.clear()
        settings = {"gradient_checkpointing": checkpointed, "data_flatten": True}
        text = dry_run(caplog, flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **settings))
        size = re.search(r"(?m)^activations of the heaviest batch +([\d.]+) MiB", text)
        assert size is not None
        found.append(float(size[1]))
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize(
    ("sharding", "warned"),
    [
        (StateSharding("FSDP2", 3, 16), True),  # 10 GiB of weights on each of 8 ranks of this machine
        (StateSharding("FSDP2", 3, 16, read_once=True), False),
        (StateSharding("DDP", 0, 4), False),
        (StateSharding("DDP", 0, 8), True),
        (StateSharding("ZeRO-3", 3, 8, masters=True), False),
    ],
)
def test_host_memory_for_loading_is_counted(
    sharding: StateSharding, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shards = sharding.ranks if sharding.stage == 3 else 1
    warn_of_loading(StateMemory(10 * 2**30 // shards, 0, 0, 0), sharding, total=64 * 2**30)
    assert ("10.00 GiB of host memory on each rank that reads, 80.00 GiB on a machine of 8" in caplog.text) is warned


def test_finds_what_would_fail_later(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, fail: Any, caplog: Any
) -> None:
    """A picture that is cut, and a weight that is missing: nothing else reads them before training starts."""
    folder = shutil.copytree(registry.parent, tmp_path / "data")
    text = (folder / "registry.py").read_text().replace(str(registry.parent), str(folder))
    (folder / "registry.py").write_text(text)
    picture = folder / json.loads((folder / "pictures.json").read_text())[0]["image"][0]
    picture.write_bytes(picture.read_bytes()[:-40])
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", folder / "registry.py", dataset_use="pictures")
    message = fail([*command, "--dry_run"])
    assert picture.name in message and "pictures.json" in message
    all_at_once = {"dataset_use": "mixed", "per_device_train_batch_size": 11}  # where a text comes first
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", folder / "registry.py", **all_at_once)
    assert picture.name in fail([*command, "--dry_run"])
    model = shutil.copytree(tiny_checkpoint("qwen3_vl"), tmp_path / "model")
    tensors = weights(model)
    missing = next(name for name in tensors if "layers.0.mlp.up" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != missing},
        model / "model.safetensors",
        {"format": "pt"},
    )
    fail([*flags(model, tmp_path / "out", registry), "--dry_run"])
    assert missing in caplog.text


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_said(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("qwenvl.train.dry_run.preflight.shutil.disk_usage", lambda _: usage._replace(free=1000))
    message = fail([*flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry), "--dry_run"])
    assert "a checkpoint takes about" in message and "--save_only_model" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_without_weights_it_says_the_same(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of config and processor alone; that the disk of this machine is too small is a warning then."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint(family), bare, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    settings = {"bf16": True, "dry_run_devices": 4, **(LORA if family == "qwen3_vl" else {})}
    text = dry_run(caplog, flags(tiny_checkpoint(family), tmp_path / "out", registry, **settings))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("qwenvl.train.dry_run.preflight.shutil.disk_usage", lambda _: usage._replace(free=1000))
    found = dry_run(caplog, flags(bare, tmp_path / "out", registry, **settings))
    assert re.sub(r"(?m)^name .*\n", "", found) == re.sub(r"(?m)^name .*\n", "", text)
    assert f"{bare} has no weights" in caplog.text and "Choose another disk" in caplog.text


def test_training_needs_weights(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, fail: Any
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "its weights could not be loaded" in fail(flags(bare, tmp_path / "out", registry))
