"""``--train_mtp`` through the front door: what is trained, logged, saved, resumed and refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.train.train_qwen import main
from tests.e2e.runs import (
    LORA,
    REPOSITORY,
    changed,
    equal_bits,
    flags,
    history,
    largest_difference,
    run_on_two_ranks,
    train,
    weights,
)
from tests.e2e.test_engines import FSDP2
from tests.e2e.test_invariance import DESCENT

FROZEN = {"tune_mm_llm": False, "tune_mm_mlp": False, "tune_mm_vision": False}
MTP: dict[str, Any] = {"train_mtp": True, "mtp_loss_weight": 0.5}
SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_use": "held_out"}


def require_sound(folder: Path, source: Path) -> None:
    """Every tensor has the source's name and shape, config and index are true, and transformers opens the folder."""
    found, wanted = weights(folder), weights(source)
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in wanted.items()}
    assert json.loads((folder / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 1
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_trained_layer_is_saved_resumed_and_verified(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    source, settings = tiny_checkpoint(family), {**MTP, **SAVING, "data_flatten": True}
    whole = train(source, tmp_path / "whole", registry, **settings, max_steps=4, verify_export=True)
    assert "Verified: a fresh process opened" in caplog.text
    assert "Saved bit for bit" not in caplog.text
    assert re.search(r"mtp +[\d,]+ +[\d,]+ +100.00% +0.001", caplog.text)
    names = {name for name in weights(source) if name.startswith("mtp.")}
    assert changed(source, whole, ("mtp.",)) == names
    train(source, tmp_path / "halved", registry, **settings, max_steps=2)
    halved = train(source, tmp_path / "halved", registry, **settings, max_steps=4)
    assert equal_bits(whole, halved) and history(halved, "mtp_loss") == history(whole, "mtp_loss")
    for folder in (whole, whole / "checkpoint-2"):
        require_sound(folder, source)
    again = train(whole, tmp_path / "again", registry, max_steps=1)
    assert not changed(whole, again, ("mtp.",)), "not trained, it is saved as it was"


def test_logs_show_both_losses_and_evaluations_the_language_models(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """The first step starts from equal weights, with and without the flag: equal ``loss``, and equal ``eval_loss``."""
    source, settings = tiny_checkpoint("qwen3_5"), {**EVALUATION, "eval_on_start": True, "max_steps": 2}
    with_it = train(source, tmp_path / "with", registry, **settings, **MTP)
    without = train(source, tmp_path / "without", registry, **settings)
    assert history(with_it)[0] == pytest.approx(history(without)[0], rel=1e-6)
    assert history(with_it, "eval_loss")[0] == history(without, "eval_loss")[0]
    assert len(history(with_it, "mtp_loss")) == 2 and len(history(with_it, "eval_mtp_loss")) == 2
    assert not history(without, "mtp_loss") and not history(without, "eval_mtp_loss")
    for name in ("mtp_loss", "eval_mtp_loss"):
        assert 5 < history(with_it, name)[0] < 8, "the logarithm of 832 is 6.7"


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 4},
    "flattened": {"per_device_train_batch_size": 4, "data_flatten": True},
    "one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


def test_neither_layout_nor_accumulation_matter(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_5")
    runs = {
        name: train(source, tmp_path / name, registry, **DESCENT, **MTP, **layout, max_steps=3)
        for name, layout in LAYOUTS.items()
    }
    for run in runs.values():
        assert largest_difference(run, runs["padded"]) < 1e-5
        for key in ("loss", "mtp_loss"):
            assert history(run, key) == pytest.approx(history(runs["padded"], key), rel=1e-5)
    assert largest_difference(source, runs["padded"]) > 1e-3


def test_alone_it_trains_the_drafter_of_a_finished_model(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_5")
    settings = {**FROZEN, **EVALUATION, "eval_on_start": True, "max_steps": 6, "learning_rate": 1e-2}
    output = train(source, tmp_path / "run", registry, **settings, train_mtp=True, verify_export=True)
    assert changed(source, output) == {name for name in weights(source) if name.startswith("mtp.")}
    assert len(set(history(output, "eval_loss"))) == 1
    drafts = history(output, "eval_mtp_loss")
    assert drafts[-1] < drafts[0] - 0.5


def test_alone_it_is_in_float32_beside_a_model_in_half_precision(registry: Path, tmp_path: Path) -> None:
    """Until it is finished: a resumed run ends with the whole one's bits, and the folder has the source's types."""
    source, settings = tmp_path / "half", {**FROZEN, **SAVING, "train_mtp": True, "bf16": True}
    build_tiny_checkpoint("qwen3_5", source, dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in weights(source).items()}
    whole = train(source, tmp_path / "whole", registry, **settings, max_steps=4, verify_export=True)
    for steps in (2, 4):
        resumed = train(source, tmp_path / "resumed", registry, **settings, max_steps=steps)
    assert equal_bits(whole, resumed)
    assert {name: tensor.dtype for name, tensor in weights(whole).items()} == types
    names = {name for name in types if name.startswith("mtp.")}
    assert changed(source, whole) == names
    saved = weights(whole / "checkpoint-2")
    assert {name for name, tensor in saved.items() if tensor.dtype != types[name]} == names
    assert all(saved[name].dtype == torch.float32 for name in names)


def single_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the MTP layer's experts one by one, as Qwen3.5-35B-A3B was published."""
    tensors = dict(tensors)
    up = tensors.pop("mtp.layers.0.mlp.experts.gate_up_proj")
    down = tensors.pop("mtp.layers.0.mlp.experts.down_proj")
    for number, (joined, last) in enumerate(zip(up, down, strict=True)):
        name = f"mtp.layers.0.mlp.experts.{number}"
        half = len(joined) // 2
        tensors |= {f"{name}.gate_proj.weight": joined[:half].clone(), f"{name}.up_proj.weight": joined[half:].clone()}
        tensors[f"{name}.down_proj.weight"] = last.clone()
    return tensors


def copy_with(tensors: dict[str, Tensor], source: Path, folder: Path) -> Path:
    """Copy a checkpoint of one file with other tensors."""
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_are_saved_as_the_source_has_them(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_5_moe")
    single = copy_with(single_experts(weights(source)), source, tmp_path / "single")
    settings = {**MTP, **SAVING, "dataset_use": "pictures,text"}
    stacked = train(source, tmp_path / "stacked", registry, **settings, max_steps=4)
    for steps in (2, 4):
        output = train(single, tmp_path / "run", registry, **settings, max_steps=steps, verify_export=True)
    require_sound(output, single)
    found, wanted = weights(output), single_experts(weights(stacked))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("qwen3_vl", {}, "--train_mtp True: checkpoints of qwen3_vl have no layer for multi-token prediction"),
    "adapters": ("qwen3_5", {**LORA}, "--train_mtp True with --lora_enable True: a folder of adapters has no place"),
    "task": ("qwen3_5", {"task": "classification"}, "--train_mtp True with --task classification"),
    "weight": ("qwen3_5", {"mtp_loss_weight": 0}, "--mtp_loss_weight 0 must be above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_cannot_be_is_refused_with_the_reason(
    case: str,
    dry_run: bool,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family, settings, said = REFUSED[case]
    command = flags(tiny_checkpoint(family), tmp_path / "out", registry, train_mtp=True, dry_run=dry_run, **settings)
    assert main(command) == 1
    assert said in caplog.text


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_checkpoint_without_the_layer_or_with_another_is_refused(
    dry_run: bool,
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = tiny_checkpoint("qwen3_5")
    tensors = weights(source)
    less = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    without = copy_with(less, source, tmp_path / "without")
    more = tensors | {"mtp.embed_tokens.weight": torch.zeros(832, 64)}
    other = copy_with(more, source, tmp_path / "other")
    for folder, said in ((without, "holds no mtp.* tensors"), (other, "no embeddings of its own, which is what")):
        assert main(flags(folder, tmp_path / "out", registry, train_mtp=True, dry_run=dry_run)) == 1
        assert said in caplog.text


def test_the_dry_run_counts_it(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sizes = []
    for trained in (False, True):
        caplog.clear()
        assert main(flags(tiny_checkpoint("qwen3_5"), tmp_path, registry, train_mtp=trained, dry_run=True)) == 0
        found = {
            name: float(re.search(rf"{name}[a-z ]* +([\d.,]+) [MG]iB", caplog.text)[1].replace(",", ""))
            for name in (
                "weights",
                "gradients",
                "optimizer",
                "activations of the heaviest batch",
                "a checkpoint, on disk",
            )
        }
        operations = float(re.search(r"operations +([\d.e+]+) FLOP", caplog.text)[1])
        sizes.append({**found, "operations": operations})
    assert all(sizes[1][name] > sizes[0][name] for name in sizes[0]), sizes


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2", "ZeRO-3", "FSDP2"])
def test_every_engine_trains_it_like_one_process(
    engine: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Ranks with different media, checkpointing, an evaluation, and a run that is resumed."""
    source = tiny_checkpoint("qwen3_5")
    name = {"ZeRO-2": "zero2", "ZeRO-3": "zero3"}.get(engine)
    settings: dict[str, Any] = {} if engine == "DDP" else dict(FSDP2)
    if name is not None:
        configuration = json.loads((REPOSITORY / "configs" / f"{name}.json").read_text())
        configuration["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (tmp_path / "zero.json").write_text(json.dumps(configuration))
        settings = {"deepspeed": str(tmp_path / "zero.json")}
    common = {**MTP, **EVALUATION, "per_device_train_batch_size": 1, "adam_epsilon": 1e-2, "max_steps": 4}
    common |= {"gradient_checkpointing": True, "data_flatten": True}
    commands = {
        "whole": flags(source, tmp_path / "whole", registry, **common, **SAVING, **settings),
        "resumed": flags(
            source,
            tmp_path / "resumed",
            registry,
            **common,
            **settings,
            resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2",
        ),
    }
    runs = run_on_two_ranks(tmp_path, commands, engine)
    single = train(source, tmp_path / "single", registry, **common, gradient_accumulation_steps=2)
    require_sound(runs["whole"], source)
    assert largest_difference(runs["whole"], single) < 1e-5
    assert changed(source, runs["whole"], ("mtp.",)) == {name for name in weights(source) if name.startswith("mtp.")}
    for key in ("loss", "mtp_loss", "eval_loss", "eval_mtp_loss"):
        assert history(runs["whole"], key) == pytest.approx(history(single, key), rel=1e-4)
    assert equal_bits(runs["whole"], runs["resumed"])
