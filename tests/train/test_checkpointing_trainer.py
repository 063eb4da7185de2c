"""What the trainer saves and loads by itself: whole folders, under their names when they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file

from qwenvl.train.checkpoint.folder import problem_of
from qwenvl.train.checkpoint.folder_check import read_source
from qwenvl.train.checkpoint.manifest import BackgroundHasher
from qwenvl.train.trainer import Trainer
from qwenvl.utils.errors import UserError
from tests.e2e.runs import LORA, REPOSITORY, equal_bits, read_config, weights

Open = Callable[..., Trainer]


def saved(trainer: Trainer, step: int) -> Path:
    """Save a checkpoint of a step; return its folder."""
    if trainer.optimizer is None:
        trainer.create_optimizer_and_scheduler(5)
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


RECORDS = {"training_args.yaml", "versions.json", "data.json", "original_processor_limits.json"}
OF_THE_RUN = {"trainer_state.json", "sampler_state.json", "running_loss.json", "manifest.json", "optimizer.pt"}


def test_a_checkpoint_holds_model_processor_state_and_records(
    trainer_of: Open, tiny_checkpoint: Callable[[str], Path]
) -> None:
    trainer = trainer_of()
    folder = saved(trainer, 2)
    names = {file.name for file in folder.iterdir()}
    assert names >= RECORDS | OF_THE_RUN | {"model.safetensors", "config.json", "tokenizer.json"}
    assert equal_bits(folder, tiny_checkpoint("qwen3_vl"))
    assert read_config(folder) == read_config(tiny_checkpoint("qwen3_vl")), "the Trainer turns use_cache off"
    assert "use_cache" not in json.loads((folder / "config.json").read_text())
    assert not (folder.parent / ".saving").exists()
    assert trainer._get_output_dir(None) == str(folder.parent)


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_the_trainer_leaves_the_cache_of_the_config_alone(use_cache: bool | None, trainer_of: Open) -> None:
    trainer = trainer_of()
    config = trainer.model.config
    vars(config).pop("use_cache", None)
    if use_cache is not None:
        config.use_cache = use_cache
    again = type(trainer)(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        order=trainer._order,
        eval_dataset=None,
        collator=trainer.data_collator,
        processor=trainer._processor,
        records=trainer._records,
    )
    assert vars(again.model.config).get("use_cache") is use_cache


@pytest.mark.parametrize("settings", [{}, {**LORA, "tune_mm_mlp": True}], ids=["whole", "adapters"])
def test_the_best_and_a_resumed_one_are_loaded_with_every_weight(settings: dict[str, Any], trainer_of: Open) -> None:
    trainer = trainer_of(**settings)
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    folder = saved(trainer, 1)
    before = {name: value.detach().clone() for name, value in trained.items()}
    trainer.state.best_model_checkpoint = str(folder)
    for load in (trainer._load_best_model, lambda: trainer._load_from_checkpoint(str(folder))):
        with torch.no_grad():
            for value in trained.values():
                value += 1
        load()
        assert all(torch.equal(value, before[name]) for name, value in trained.items())


def test_random_numbers_go_on_and_a_damaged_state_is_named(trainer_of: Open) -> None:
    trainer = trainer_of(**LORA)
    folder = saved(trainer, 1)
    drawn = torch.rand(3)
    trainer._load_rng_state(str(folder))
    assert torch.equal(torch.rand(3), drawn)
    (folder / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"optimizer\.pt is damaged"):
        trainer._load_optimizer_and_scheduler(str(folder))
    (folder / "rng_state.pth").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"is damaged"):
        trainer._load_rng_state(str(folder))


def test_what_fsdp_shares_out_is_gathered(trainer_of: Open, tmp_path: Path) -> None:
    """Nothing is, in one process: what is gathered is the model."""
    trainer = trainer_of()
    trainer.is_fsdp_enabled = True
    trainer.save_model(str(tmp_path / "gathered"))
    trainer.is_fsdp_enabled = False
    trainer.save_model(str(tmp_path / "plain"))
    assert equal_bits(tmp_path / "gathered", tmp_path / "plain")


def test_fsdp_is_turned_on_where_accelerate_would_not(trainer_of: Open) -> None:
    """On CPUs it would train with DDP, and the trainer would save what it takes for a whole model."""
    try:
        trainer = trainer_of(fsdp=True, fsdp_config=REPOSITORY / "configs" / "fsdp2.json")
        assert trainer.is_fsdp_enabled
        assert trainer.accelerator.distributed_type == DistributedType.FSDP
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not trainer_of().is_fsdp_enabled


def test_a_whole_checkpoint_is_pushed_on_request(trainer_of: Open) -> None:
    """As far as it comes without a network; tests/train/export/test_hub.py has a hub."""
    trainer = trainer_of()
    trainer.args.push_to_hub, trainer.hub_model_id = True, "me/model"
    with pytest.raises(OfflineModeIsEnabled):
        saved(trainer, 1)
    assert problem_of(Path(trainer.args.output_dir) / "checkpoint-1") is None
    with pytest.raises(OfflineModeIsEnabled):
        trainer.save_final()
    process = trainer.args.distributed_state
    trainer.args.save_on_each_node, process.process_index = True, 1
    try:
        assert (saved(trainer, 2) / "config.json").is_file(), "each machine saves, and one of them pushes"
    finally:
        process.process_index = 0


def test_adapters_are_saved_without_what_is_frozen(trainer_of: Open) -> None:
    trainer = trainer_of(**LORA)
    folder = saved(trainer, 1)
    assert not list(folder.glob("model*.safetensors"))
    assert all(".lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert {file.name for file in folder.iterdir()} >= RECORDS


def test_as_many_checkpoints_are_kept_as_asked_for_and_the_best(trainer_of: Open) -> None:
    trainer = trainer_of(save_total_limit=2)
    for step in (1, 2, 3, 4):
        saved(trainer, step)
        if step == 2:
            trainer.state.best_global_step = 2
            trainer._name_best()
    folder = Path(trainer.args.output_dir)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")


def test_the_finished_model_has_the_precision_that_is_asked_for(trainer_of: Open, tmp_path: Path) -> None:
    trainer = trainer_of(save_dtype="bfloat16")
    trainer.save_final()
    found = weights(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert not (tmp_path / "out" / ".saving").exists() and not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "README.md").exists(), "no card was given"


def test_a_folder_that_lacks_a_tensor_is_said(
    trainer_of: Open, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    trainer = trainer_of()
    source = read_source(str(tiny_checkpoint("qwen3_vl")))
    trainer._records = replace(trainer._records, source=source)
    trainer.save_final()
    first = next(iter(source.values()))
    trainer._records = replace(trainer._records, source={**source, "model.more.weight": first})
    for save in (trainer.save_final, lambda: saved(trainer, 1)):
        with pytest.raises(UserError, match=r"was saved, but is not complete:\n.*model\.more\.weight"):
            save()


def test_a_run_resumed_at_its_end_takes_no_further_step(trainer_of: Open) -> None:
    trainer = trainer_of(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.data_report.start_over()
    trainer.train()
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    again = trainer_of(max_steps=2)
    again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    assert again.state.global_step == 2
    assert all(torch.equal(value, before[name]) for name, value in again.model.named_parameters())


@pytest.mark.parametrize("kind", ["fast", "full"])
def test_every_byte_is_hashed_behind_where_it_is_asked_for(kind: str, trainer_of: Open) -> None:
    trainer = trainer_of(checkpoint_hash=kind)
    hashed: list[Path] = []
    trainer._hasher = BackgroundHasher(hashed.append)
    folder = saved(trainer, 1)
    trainer.save_final()
    assert hashed == ([folder] if kind == "full" else [])
